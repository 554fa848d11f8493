"""What a store's file holds, and how the file of an older schema becomes one of this: the SQL, step by step."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from edge.errors import ConfigError

APPLICATION_ID = 0x4C4F4F4B  # "LOOK": tells a store from another program's SQLite file

PAGE = 16 << 10  # bytes; a person takes about 2 kB, of which a page of 4 KiB, SQLite's own choice, would hold one

# STEPS[n] makes schema n + 1 of schema n; a new file takes them all. PRAGMA user_version holds the number.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        # One row per event: the header's fields, and when it came (seconds since 1970, UTC). `id` is the order of
        # arrival.
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY,
            device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
            camera TEXT NOT NULL, frame INTEGER NOT NULL, captured_at REAL NOT NULL,
            width INTEGER NOT NULL, height INTEGER NOT NULL, bundle TEXT NOT NULL, bank TEXT NOT NULL,
            embedding_dim INTEGER NOT NULL, skipped INTEGER NOT NULL, received_at REAL NOT NULL,
            UNIQUE (device, epoch, seq)
        )""",
        # One row per person, `number` from 0 in the event's order. Box in px of the source frame; answers as the JSON
        # of the wire; embedding as embedding_dim little-endian float16; crop as JPEG or NULL.
        """CREATE TABLE people (
            event INTEGER NOT NULL REFERENCES events (id), number INTEGER NOT NULL,
            x1 REAL NOT NULL, y1 REAL NOT NULL, x2 REAL NOT NULL, y2 REAL NOT NULL, score REAL NOT NULL,
            answers TEXT NOT NULL, embedding BLOB NOT NULL, crop BLOB,
            PRIMARY KEY (event, number)
        )""",
    ),
    (
        # digest: 16 bytes of BLAKE2b over the event as edge.events writes it, each frame after its length (8 bytes,
        # big-endian); NULL for events of schema 1. notices: a JSON list, or NULL for none.
        "ALTER TABLE events ADD COLUMN digest BLOB",
        "ALTER TABLE events ADD COLUMN notices TEXT",
        # One row per epoch of a device. Every number below `next` is accounted for. A number below `pruned` that is
        # neither in `events` nor in `gone` was here, and retention removed it. refused: how many were set aside.
        """CREATE TABLE streams (
            device TEXT NOT NULL, epoch INTEGER NOT NULL, next INTEGER NOT NULL, pruned INTEGER NOT NULL,
            refused INTEGER NOT NULL, PRIMARY KEY (device, epoch)
        ) WITHOUT ROWID""",
        # The numbers first..last of which no event is to be expected, and why. No two ranges overlap, and none holds
        # the number of an event that is, or was, stored.
        """CREATE TABLE gone (
            device TEXT NOT NULL, epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
            reason TEXT NOT NULL, recorded_at REAL NOT NULL, PRIMARY KEY (device, epoch, last)
        ) WITHOUT ROWID""",
        # What was refused, for a person to look at. size: bytes of all frames; frames: the beginning of them, each
        # after its length (8 bytes, big-endian). digest: as above, over all frames as they came.
        """CREATE TABLE quarantine (
            id INTEGER PRIMARY KEY,
            device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL,
            received_at REAL NOT NULL, size INTEGER NOT NULL, digest BLOB NOT NULL, frames BLOB NOT NULL,
            UNIQUE (device, epoch, seq, digest)
        )""",
        # Schema 1 could not know what was lost: what it has without a hole from 0 is accounted for.
        """INSERT INTO streams SELECT device, epoch, sum(seq = place), 0, 0 FROM (
            SELECT device, epoch, seq, row_number() OVER (PARTITION BY device, epoch ORDER BY seq) - 1 AS place
            FROM events
        ) GROUP BY device, epoch""",
    ),
    (
        # ended: a JSON list as on the wire, or NULL for none.
        "ALTER TABLE events ADD COLUMN ended TEXT",
        "ALTER TABLE events ADD COLUMN encoder TEXT",
        # One row per person that is followed over time: the track's number, and how many looks the answers rest on. A
        # table of its own: a column of `people` would lie behind the crops, and an older collector that still runs
        # writes its people without it.
        """CREATE TABLE tracks (
            event INTEGER NOT NULL, number INTEGER NOT NULL, track INTEGER, looks INTEGER,
            PRIMARY KEY (event, number)
        ) WITHOUT ROWID""",
        # What people said is true of a person, whatever the answers say. labelled_at: seconds since 1970, UTC.
        """CREATE TABLE labels (
            event INTEGER NOT NULL, number INTEGER NOT NULL, category TEXT NOT NULL, option TEXT NOT NULL,
            labelled_at REAL NOT NULL, PRIMARY KEY (event, number, category)
        ) WITHOUT ROWID""",
        # Both leave with their person, whichever version removes it: an event's id is given again.
        """CREATE TRIGGER person_left AFTER DELETE ON people BEGIN
            DELETE FROM tracks WHERE event = old.event AND number = old.number;
            DELETE FROM labels WHERE event = old.event AND number = old.number;
        END""",
    ),
    (
        # clock: "unsynchronised" where the box's clock was not set when it saw this, or NULL.
        "ALTER TABLE events ADD COLUMN clock TEXT",
    ),
)
SCHEMA_VERSION = len(STEPS)

log = logging.getLogger(__name__)


def prepare(database: sqlite3.Connection, path: Path, create: bool) -> None:
    """Make an empty file a store (`create`), an older one a store of this schema, in one transaction.

    database: in autocommit mode. Raises ConfigError for a file that is no store, that was written by a newer version,
    or that is older and cannot be written; sqlite3.Error.
    """
    if not create and _version(database, path, create) == SCHEMA_VERSION:
        return
    database.execute(f"PRAGMA page_size = {PAGE}")  # of a file that is not there yet; of any other it changes nothing
    try:
        database.execute("BEGIN IMMEDIATE")  # finds out at once if it can write
        version = _version(database, path, create)  # again: another may have been faster
        if 0 < version < SCHEMA_VERSION:  # seconds for each million events
            log.warning("store %s: schema %d becomes %d; all it holds is kept", path, version, SCHEMA_VERSION)
        for statement in (statement for step in STEPS[version:] for statement in step):
            database.execute(statement)
        if version < SCHEMA_VERSION:
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if create or "readonly" not in str(error):
            raise
        raise ConfigError(
            f"store {path} is of an older schema and cannot be written",
            expected=f"schema {SCHEMA_VERSION}",
            got=_version(database, path, create),
            remedy="open it, or a copy of it, once where it can be written: it becomes new and keeps all it holds",
        ) from error
    finally:
        if database.in_transaction:  # SQLite ends it itself on some errors, a full disk among them
            database.execute("ROLLBACK")


def _version(database: sqlite3.Connection, path: Path, create: bool) -> int:
    """The file's schema; 0 for an empty file that is to become a store. Raises ConfigError for what is no store."""
    (tables,), (application,), (version,) = (
        database.execute(query).fetchone()
        for query in ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
    )
    if create and not tables:
        return 0
    if application != APPLICATION_ID:
        got = "another program's SQLite file" if tables else "an empty file"
        raise ConfigError(f"store {path} is no lookout store", got=got, remedy="choose another file")
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"store {path} was written by a newer lookout",
            expected=f"schema {SCHEMA_VERSION}",
            got=version,
            remedy="update lookout here or choose another file",
        )
    return int(version)
