"""The address of a camera: what of it people may see, and the user and password in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote


@dataclass(frozen=True)
class Address:
    """A URL without its user and password, which stand beside it as the camera wants to hear them."""

    url: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


def parted(url: str) -> Address:
    """Take the user and password out of scheme://user:password@host:port/path.

    As FFmpeg does: they end at the last @ before the first / ? or #, and %40 in them is an @.
    """
    scheme, _, rest = url.partition("://")
    place = re.match(r"[^/?#]*", rest)
    authority = place[0] if place else ""
    login, _, host = authority.rpartition("@")
    user, _, password = login.partition(":")
    return Address(f"{scheme}://{host}{rest[len(authority) :]}", unquote(user), unquote(password))


def shown(source: str) -> str:
    """A source as people may see it: of a URL only scheme, user and host, as passwords hide in path and query too.

    An @ in path or query may mean a password with a / or ? in it, or a token with an @: then only the scheme is shown.
    What is no URL, but looks like user:password@host, is a mistyped one.
    """
    url = re.match(r"(.*?:/+)([^/?#]*)(.*)", source, re.DOTALL)
    if not url:
        return re.sub(r"([^/?#:@]*):.*@", r"\1:***@", source, flags=re.DOTALL)
    scheme, authority, rest = url.groups()
    login, at, host = authority.rpartition("@")
    if "@" in rest or "@" in scheme:
        return f"{re.split('[@:]', scheme)[0]}://…"
    user, colon, _ = login.partition(":")
    return scheme + (f"{user}:***@" if colon else "***@" if at else "") + host
