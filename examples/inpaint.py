"""Draw the lower half of a picture anew, and keep the upper: before.png, and after-0.png to after-2.png.

No model is trained for this. The picture becomes tokens, and while the model draws, its own tokens are replaced by the
picture's wherever the mask says keep.
"""

from PIL import Image

import varkit
from varkit.data.real import Digits
from varkit.edit.inpaint import box_mask, inpaint, paste

pipeline = varkit.load("digits")
picture = Image.fromarray(Digits().batch([3], pipeline.size).images[0])
picture.save("before.png")

redraw = box_mask((picture.height, picture.width), (0.5, 0.0, 1.0, 1.0))
for i, image in enumerate(paste(inpaint(pipeline, picture, redraw, "nine", n=3, seed=0), picture, redraw)):
    image.save(f"after-{i}.png")
