"""`varkit embed`: prompts to the features that a text encoder gives of them, once and for all."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from varkit.cli.console import progress
from varkit.cli.generate import read_prompts
from varkit.files import ensure_writable


@dataclass(frozen=True)
class Embed:
    """Compute what a text encoder makes of prompts, for varkit generate --embeddings."""

    prompts: Positional[Path]
    """A text file with one prompt a line."""
    text_encoder: str
    """A folder, or a name on the Hugging Face hub, of a T5 or CLIP."""
    out: Path
    """The file to write, .safetensors or .npz."""
    negative: str | None = None
    """Also compute what `varkit generate --negative` will need."""
    dtype: str | None = None
    """Compute in float32, bfloat16 or float16; by default as the text encoder was saved."""
    clean_prompts: bool = False
    """Clean what the text encoder reads, as the captions that LlamaGen was trained on."""

    def run(self) -> None:
        """Write the file and print its path."""
        prompts = [str(prompt) for prompt in read_prompts(self.prompts)]
        prompts += [] if self.negative is None else [self.negative]
        ensure_writable(self.out)

        from varkit.hub.embeddings import check_suffix, save_embeddings
        from varkit.hub.text_encoders import PretrainedEncoder

        check_suffix(self.out)
        encoder = PretrainedEncoder.load(self.text_encoder, self.dtype, self.clean_prompts)
        rows = {}
        with progress("encoding", len(prompts)) as advance:
            for prompt in prompts:
                rows[prompt] = encoder.encode(prompt)
                advance()
        save_embeddings(self.out, rows)
        print(self.out)
