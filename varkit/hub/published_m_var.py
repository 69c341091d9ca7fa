"""A published M-VAR generator over VAR's tokenizer as a whole pipeline, and back."""

from functools import partial

from varkit.hub import m_var, published_var
from varkit.hub.published_var import Layout

LAYOUT = Layout(
    m_var.generator_configs,
    m_var.generator_from_published,
    m_var.generator_to_published,
    history=0,
    file="d{}.pth",
    training=("drop_path", "adaln_init", "published_start"),
)
pipeline = partial(published_var.pipeline, layout=LAYOUT)
files = partial(published_var.files, layout=LAYOUT)
