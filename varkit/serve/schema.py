"""What is asked and answered, by OpenAI's images convention; what is not listed here is refused by name."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MOST_PICTURES = 10
MOST_PARTIALS = 3
LONGEST_PROMPT = 4000
OWN_SIZE = "auto"
SIZE = re.compile(r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")

Format = Literal["png", "jpeg", "webp"]


def _whole(value: Any) -> Any:
    """3.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _absent(value: Any) -> Any:
    """A form has no null: an empty field was left out."""
    return None if value == "" else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, StringConstraints(max_length=LONGEST_PROMPT)]
Size = Annotated[str, StringConstraints(pattern=SIZE.pattern)]


class Asked(BaseModel):
    """What generations and edits have in common."""

    model: Annotated[str | None, Field(description="One of /v1/models; by default the first.")] = None
    n: Annotated[Whole | None, Field(ge=1, le=MOST_PICTURES, description="Pictures.")] = None
    size: Annotated[Size | None, Field(description="WIDTHxHEIGHT in pixels, or auto.")] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="url gives a data: URL.")
    ] = None
    output_format: Format | None = None
    output_compression: Annotated[
        Whole | None, Field(ge=0, le=100, description="Quality of jpeg and webp.")
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        Whole | None,
        Field(
            ge=0, le=MOST_PARTIALS, description="Pictures so far that a stream shows, evenly over the steps."
        ),
    ] = None
    user: Annotated[Text | None, Field(description="Accepted, and not used.")] = None
    seed: Annotated[
        Whole | None,
        Field(ge=0, le=2**63 - 1, description="Picture i is sample i of it; by default a new one."),
    ] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0, le=100, allow_inf_nan=False, description="s in u + s (c - u); 1 is off.")
    ] = None
    negative_prompt: Annotated[Text | None, Field(description="What guidance leads away from.")] = None


class Generation(Asked):
    """The body of /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[
        Text, Field(min_length=1, description="A caption, or the name of a class or its label.")
    ]


class Edit(Asked):
    """The fields of /v1/images/edits that are no files."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[
        Text | None,
        BeforeValidator(_absent),
        Field(description="What the new picture shows; without it the model is not told."),
    ] = None


class EditForm(Edit):
    """The form of /v1/images/edits, as it is described to clients."""

    image: Annotated[str, Field(description="The picture.", json_schema_extra={"format": "binary"})]
    mask: Annotated[
        str | None,
        Field(
            description="A picture of the same size: what is transparent in it is drawn anew. Without it the "
            "picture's own transparency counts.",
            json_schema_extra={"format": "binary"},
        ),
    ] = None


class TokenDetails(BaseModel):
    """Where tokens went."""

    text_tokens: int = 0
    image_tokens: int = 0


class Usage(BaseModel):
    """Positions that were drawn. Prompts are not counted."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, tokens: int) -> "Usage":
        """The usage of so many positions."""
        return cls(output_tokens=tokens, total_tokens=tokens)


class Picture(BaseModel):
    """A finished picture: base64, or a data: URL."""

    b64_json: str | None = None
    url: str | None = None


class Pictures(BaseModel):
    """The answer to generations and edits that are not streamed. With its seed they can be drawn again."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    seed: int
    usage: Usage


class PictureEvent(BaseModel):
    """An event of a stream: a picture so far (with its number), or a finished one (with its usage)."""

    type: str
    b64_json: str
    created_at: int
    size: str
    output_format: Format
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    seed: int
    index: Annotated[int, Field(description="Which of the n pictures.")]
    partial_image_index: int | None = None
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["varkit"] = "varkit"
    size: Annotated[str, Field(description="WIDTHxHEIGHT of its pictures, unless another is asked for.")]
    prompts: Annotated[Literal["captions", "classes"], Field(description="What its prompts are.")]
    edits: Annotated[bool, Field(description="Whether it can edit.")]


class ModelList(BaseModel):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "stopping", "broken"]
    waiting: int
    active: int
