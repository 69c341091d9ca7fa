"""Draw the right half of a picture anew, and keep the left: before.png, and after-0.png to after-2.png.

No model is trained for this. The picture becomes tokens, and while the model draws, its own tokens are replaced by the
picture's wherever the mask says keep.
"""

from PIL import Image

import varkit
from varkit.data.render import SceneObject, paint
from varkit.edit.inpaint import box_mask, inpaint, paste

star = SceneObject("star", "yellow", "large", x=0.25, y=0.5)
ring = SceneObject("ring", "red", "large", x=0.75, y=0.5)
picture = Image.fromarray(paint([star, ring], "grey", side=64))
picture.save("before.png")

redraw = box_mask((picture.height, picture.width), (0.0, 0.5, 1.0, 1.0))
caption = "a yellow star left of a blue circle on a grey background"
edited = inpaint(varkit.load("scenes-tidy"), picture, redraw, caption, n=3, seed=0)
for i, image in enumerate(paste(edited, picture, redraw)):
    image.save(f"after-{i}.png")
