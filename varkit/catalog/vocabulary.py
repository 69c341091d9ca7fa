"""The words that records of the catalogue may use, each with what it means: one dictionary a field, words as keys.

They follow "Autoregressive Models in Vision: A Survey" (arXiv 2411.05902), whose taxonomy starts from what is predicted
at a time: the unit. A record that needs another word adds it here and nowhere else.
"""

STAGE = {
    "tokenizer": "turns pixels into latents and back",
    "generator": "predicts latents, one unit after the other",
    "training": "changes how a generator is trained",
    "representation": "trains features rather than pictures",
    "accelerator": "takes fewer or cheaper evaluations to the same picture",
    "cache": "keeps fewer keys and values of earlier steps",
    "search": "spends more evaluations on a better picture",
    "control": "follows a second picture such as edges or depth",
    "edit": "changes a given picture",
    "personalise": "learns one subject from a few pictures",
    "sr": "super-resolution and restoration",
    "safety": "marks pictures, or removes concepts from a model",
    "eval": "measures",
    "application": "predicts something other than pictures",
}

UNIT = {
    "pixel": "one pixel, or one colour of it",
    "token": "one position of a latent",
    "scale": "all positions of one resolution",
    "frequency": "one band of spatial frequencies",
    "patch": "one square of the picture",
    "cell": "one square of neighbouring latent positions",
    "frame": "one frame, or a chunk of frames, of a video",
    "face": "one side of a cube map during a span of time",
    "feature": "the features of one frame",
    "zoom-step": "one choice of where to look closer",
    "joint": "one joint of a skeleton",
    "character": "one character of a word",
}

REPRESENTATION = {
    "raw": "pixel values",
    "vq": "codes of one vector-quantised grid or line",
    "rvq": "codes of what earlier codes left over",
    "lfq": "signs without a codebook",
    "bsq": "signs of a unit vector",
    "fsq": "rounded coordinates",
    "continuous": "real vectors",
    "structured": "ids and coordinates of things other than pictures",
}

ORDER = {
    "raster": "row after row",
    "random": "random, often several at once",
    "semantic": "from what matters most outwards",
    "neighbour": "by distance from a corner",
    "diagonal": "one anti-diagonal after the other",
    "scale": "coarse to fine",
    "1d-ordered": "along a line of tokens",
    "spatiotemporal": "through space and time",
    "tree": "parents before children",
    "parallel": "all at once",
    "any": "whatever its base does",
}

HEAD = {
    "softmax": "a distribution over codes",
    "logistic-mixture": "a mixture of discretised logistics",
    "bitwise": "one coin a bit",
    "diffusion": "a small denoising network",
    "flow": "a small velocity network, integrated",
    "regression": "the value itself",
    "any": "whatever its base has",
}

TASKS = {
    "unconditional": "pictures of the training set's kind",
    "class-to-image": "a class to a picture",
    "text-to-image": "a caption to a picture",
    "reconstruction": "a picture to its latents and back",
    "editing": "a picture and an instruction to a picture",
    "control": "a control picture to a picture",
    "personalisation": "a learned subject in a new picture",
    "super-resolution": "a small or damaged picture to a large one",
    "erasure": "a model that no longer draws a concept",
    "watermarking": "a hidden mark that can be found again",
    "class-to-video": "a class to a clip",
    "text-to-video": "a caption to a clip",
    "video-continuation": "first frames to the following ones",
    "panorama": "a perspective video to one all around",
    "forecasting": "features of later frames",
    "representation": "features for other tasks",
    "understanding": "questions about a picture",
    "recognition": "a picture of a word to its characters",
    "localisation": "a street picture to a place on a map",
    "rigging": "a shape to a skeleton",
}

TECHNIQUES = {
    "residual-quantization": "each map codes what the coarser ones left over",
    "absolute-maps": "each scale's map stands by itself",
    "latent-pyramid": "scales of a continuous latent, shrunk rather than quantised",
    "frequency-bands": "the latent split in its Fourier spectrum",
    "binary-codes": "codes made of bits",
    "low-dimensional-codebook": "many codes of few, normalised numbers",
    "codebook-clustering": "a coarse label for each group of similar codes",
    "query-tokens": "learned queries gather the picture into a line of tokens",
    "nested-dropout": "later tokens are dropped in training, so that any prefix decodes",
    "diffusion-decoder": "latents to pixels by a diffusion or flow model",
    "feature-compression": "a latent of features instead of pixels",
    "self-correction": "training on wrong codes with targets that repair them",
    "noisy-context": "training on noisy instead of clean context",
    "student-forcing": "training on the model's own predictions",
    "loss-weighting": "scales or positions count differently",
    "feature-alignment": "inner features drawn towards those of a vision network",
    "semantic-targets": "predicting codes of meaning rather than of looks",
    "auxiliary-losses": "side tasks that exist in training only",
    "distillation": "learning from a trained model's outputs",
    "reinforcement-learning": "learning from rewards of samples",
    "masked-prediction": "some positions from all others",
    "masked-convolution": "convolutions that see only earlier pixels",
    "markov-scales": "a scale sees only the one before",
    "neighbourhood-attention": "attention within a window",
    "state-space": "a recurrent scan instead of attention",
    "two-stream": "content and queries in separate streams",
    "two-phases": "a first pass of one kind guides a second of another",
    "token-grouping": "several tokens in one position of the network",
    "transition-kernels": "learned steps from noise to data",
    "chunk-causal": "chunks of frames, each seeing those before",
    "order-planning": "the order is computed from the input",
    "observation-loop": "each choice decides what is seen next",
    "pointer": "choosing among earlier outputs",
    "parallel-decoding": "several positions in one evaluation",
    "speculative-decoding": "cheap drafts, verified together",
    "feature-reuse": "the last step's result instead of an evaluation",
    "kv-compression": "dropping or merging keys and values",
    "cache-sharing": "one cache for all denoising steps",
    "head-classification": "attention heads sorted by what they look at",
    "verifier": "scores of partial or whole pictures",
    "resampling": "good candidates are copied, bad ones dropped",
    "clustering": "one candidate kept of each kind",
    "beam-search": "the best prefixes go on",
    "prompt-rewriting": "the caption is made more explicit",
    "prompt-tokens": "extra tokens before those of the picture",
    "adapter": "small modules added to a trained model",
    "lora": "low-rank changes of a trained model's weights",
    "partial-fine-tuning": "only some of a trained model's weights change",
    "reference-attention": "attention to the tokens of another picture",
    "prefix-forcing": "the first units are given, not drawn",
    "feature-injection": "hidden features of one run used in another",
    "vocabulary-bias": "some codes are preferred in sampling",
    "round-trip-metrics": "comparing a picture with its reconstruction",
}

CONDITIONING = {
    "none": "nothing",
    "class": "a class",
    "text": "a caption, an instruction or a question",
    "image": "a picture",
    "control": "a control picture: edges, depth, segmentation",
    "subject": "a few pictures of a subject",
    "video": "frames",
    "features": "features of frames",
    "points": "a cloud of points",
}

SOURCE = {
    "abstract": "the paper's abstract",
    "paper": "the paper's text or tables",
    "repository": "the published code, its README or the project's page",
    "review": "public reviews of the paper",
    "secondary": "summaries by others, quoting the paper",
}

ROOM = {
    "tokenizers": "tokenizers",
    "generators": "generators, with their plans and heads",
    "decode": "sampling, speculation, search, watermarks",
    "decode/cache": "cache policies",
    "adapt": "what changes a trained model",
    "train": "how models are trained",
    "edit": "editing and super-resolution",
    "video": "frames and clips",
    "beyond": "other things predicted step by step",
    "evaluate": "metrics",
}

VOCABULARY: dict[str, dict[str, str]] = {
    "stage": STAGE,
    "unit": UNIT,
    "representation": REPRESENTATION,
    "order": ORDER,
    "head": HEAD,
    "tasks": TASKS,
    "techniques": TECHNIQUES,
    "conditioning": CONDITIONING,
    "room": ROOM,
    "source": SOURCE,
}
"""By the field of a record (`source` is a claim's)."""

FAMILIES = ("pixel", "token", "scale", "other")
FAMILY_OF_UNIT = {"pixel": "pixel", "token": "token", "cell": "token", "scale": "scale"}
"""The survey's three families; units outside it (frequencies, frames, joints, ...) are "other"."""
