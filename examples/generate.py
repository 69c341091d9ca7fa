"""Classes in, pictures out: digit-0.png and digit-1.png in the current folder."""

import varkit

pipeline = varkit.load("digits")
for i, image in enumerate(pipeline.generate(["three", 8], seed=0)):
    image.save(f"digit-{i}.png")
