"""A bundle of full size, YOLOv4-416 and ViT-B/32, with no download: its weights are random, spread as trained ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from edge.bundle import GOLDEN, IMAGE, PROMPTS, TEXT, Bundle, open_bundle
from edge.golden import Golden
from export.build import Say, build
from export.recipe import read_recipe
from tests.bench.__main__ import full_size_recipe
from tests.trained_like import clip_state, trained_like, words_for


def full_size(folder: Path, say: Say = lambda step, said: None) -> Bundle:
    """Built in `folder`, without engines.

    Its words are such as its crops differ by: with random ones every second decision is a coin's, in any precision.
    """
    recipe = full_size_recipe(folder)
    trained_like(folder / "yolov4.cfg", folder / "yolov4.weights")
    checkpoint, image_tower = folder / "vit.safetensors", clip_state()
    state = load_file(checkpoint)
    state |= {key: value.astype(np.float16) for key, value in image_tower.items() if key.startswith("visual.")}
    save_file(state, checkpoint)
    bundle = build(read_recipe(recipe), folder / "full", say)
    vectors, files = Golden.read(bundle.file(GOLDEN)).embeddings, bundle.manifest.files
    words = words_for(vectors, scale=bundle.manifest.encoder.logit_scale)
    bundle.file(PROMPTS).write_bytes(replace(words, text_sha256=files[TEXT], image_sha256=files[IMAGE]).to_bytes())
    return open_bundle(bundle.path)
