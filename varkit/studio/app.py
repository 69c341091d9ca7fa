"""The web page as an application: the pages in tabs, its looks, and the server's limits.

Nothing is loaded from elsewhere: fonts are the system's, and gradio's reports home are off.
"""

from collections.abc import Iterator

import gradio as gr  # before fastapi, which it brings: where both are missing, gradio is named
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse
from PIL import Image

from varkit.studio import compare, edit, generate, systems, tokenizer
from varkit.studio.controls import Models, in_one_sentence
from varkit.studio.drawing import enlarged

EDIT = "edit"
MOST_WAITING = 64
LARGEST_UPLOAD = "64mb"
KEPT_SECONDS = 24 * 3600
"""How long pictures that were shown or uploaded stay on the disk."""

STYLE = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 1px; }
.status p { min-height: 1.5em; margin: 0; }
/* Galleries as tall as what they show, with as many pictures side by side as fit. */
.pictures .gallery-container, .pictures .grid-wrap { height: auto !important; min-height: 5rem !important;
  max-height: none !important; }
.pictures .grid-container { grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)) !important; }
.small .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)) !important; }
.pictures:has(.preview) .gallery-container { min-height: 26rem; }
.pictures .thumbnail-item > img { width: 100%; height: 100%; object-fit: contain; }
#systems-list details { border-bottom: 1px solid var(--border-color-primary); padding: 0.4rem 0; }
#systems-list summary { cursor: pointer; overflow-wrap: anywhere; }
#systems-list dt { font-weight: 600; }
#systems-list dd { margin: 0 0 0.5rem 1rem; overflow-wrap: anywhere; }
#systems-list img { max-width: 100%; image-rendering: pixelated; }
#systems-list .works { font-weight: 600; color: var(--color-accent); }
@media (max-width: 30rem) {
  main.app { padding: 0.75rem !important; }
  .tab-container button { padding: 0 0.3rem !important; font-size: 0.8rem !important; }
}
#tokenizer-codes table { width: 100%; }
#tokenizer-codes :is(td, th) { padding: 0.25rem 0.5rem; }
"""


def create_app(models: Models, workers: int = 2, login: tuple[str, str] | None = None) -> FastAPI:
    """The studio for `models`, as an ASGI application. `workers` runs go on at once; `login` is a name and a password
    that every visitor has to give.
    """
    app = FastAPI(title="varkit studio", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(f"/{systems.PICTURES}/{{name}}.png")
    def picture(name: str) -> FileResponse:
        path = systems.picture_of(name)
        if path is None:
            raise HTTPException(404, "there is no such picture")
        return FileResponse(path)

    return gr.mount_gradio_app(
        app,
        blocks(models, workers),
        path="/",
        auth=login,
        theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
        css=STYLE,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


def blocks(models: Models, workers: int) -> gr.Blocks:
    """The pages."""
    with gr.Blocks(title="varkit studio", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown("# varkit studio")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                send, pictures = generate.page(models)
            with gr.Tab("Edit", id=EDIT):
                editor = edit.page(models)
            with gr.Tab("Tokenizer", id="tokenizer"):
                tokenizer.page(models)
            with gr.Tab("Systems", id="systems"):
                systems.page()
            with gr.Tab("Compare", id="compare"):
                compare.page(models)
        send.click(in_one_sentence(_to_editor), pictures, [editor, tabs], api_visibility="private")
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=workers)


def _to_editor(shown: list[tuple[Image.Image, str | None]] | None) -> Iterator[tuple[Image.Image, gr.Tabs]]:
    yield enlarged(generate.first_of(shown)), gr.Tabs(selected=EDIT)
