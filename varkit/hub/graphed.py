"""A pipeline by CUDA graphs (`varkit.decode.graphs`): the same pictures, sooner where the device waits for the host.

pipeline = graphed(varkit.load("scenes").to("cuda", torch.bfloat16))
pipeline.generate(prompts, batch_size=8)    # the first 8 record, the next ones replay
"""

from varkit.decode.cache.full import FullCache
from varkit.decode.graphs import cuda_graphs
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline


def graphed(pipeline: Pipeline) -> Pipeline:
    """The same model, whose runs record their steps at a batch's first shape and replay them from then on.

    One run of a shape at a time; what makes another pipeline of this one (`sized`, `over`, ...) has to come before.
    Raises `UserError` without a CUDA device, and for a pipeline with a cache or ports of a method's own.
    """
    if pipeline.how.cache is not FullCache or pipeline.how.ports:
        raise UserError("CUDA graphs know neither other caches nor ports; use the method without `graphed`")
    graphs = cuda_graphs(pipeline.model, pipeline.device)
    other = pipeline.using(cache=graphs.cache)
    other.model = graphs.model
    return other
