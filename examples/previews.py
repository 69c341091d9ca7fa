"""Watch a picture grow: every step of decoding gives the picture so far. Writes growing.gif and growing.png.

`stream` yields after each step. It is a loop around `varkit.decode.loop.decode`, which leaves the decisions to its
caller: stop early, show a progress bar, or look at something other than pixels.
"""

import varkit
from varkit.pictures import grid

pipeline = varkit.load("scenes-tidy")
prompt = "a small white cross above a large purple square on a navy background"

frames = []
for step, (image,) in enumerate(pipeline.stream([prompt], seed=0)):
    print(f"step {step + 1}: {image.width} x {image.height} pixels")
    frames.append(image.resize((256, 256)))

frames[0].save("growing.gif", save_all=True, append_images=frames[1:], duration=500, loop=0)
grid(frames, columns=len(frames)).save("growing.png")
