"""Captions in, pictures out: scene-0.png and scene-1.png in the current folder."""

import varkit

pipeline = varkit.load("scenes-tidy")
prompts = ["three blue stars on a beige background", "a green ring left of an orange heart"]
for i, image in enumerate(pipeline.generate(prompts, seed=0)):
    image.save(f"scene-{i}.png")
