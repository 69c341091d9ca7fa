"""The published checkpoints by name: which files make a model, and where they are.

Files come from the Hugging Face hub, by way of its cache, or from a folder that holds them under their published names.
Nothing here looks into a file: `varkit.hub.published` tells what is in it and converts it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath
from varkit.hub.fetch import NotFetched, fetched
from varkit.hub.folder import CONFIG
from varkit.hub.pipeline import Pipeline, bundled, load
from varkit.hub.states import PICKLE_SUFFIXES

SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class Repository:
    """variants: the files of each; a folder with a slash at its end stands for all shards in it. addresses: of files
    that are not on the hub. elsewhere: the repositories of files that are in another one.
    """

    variants: Mapping[str, tuple[str, ...]]
    addresses: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)


def _var(depth: int) -> tuple[str, ...]:
    return "vae_ch160v4096z32.pth", f"var_d{depth}.pth"


def _dropbox(place: str) -> str:
    return f"https://www.dropbox.com/scl/fi/{place}&dl=1"


RELEASED = {
    "FoundationVision/var": Repository({f"d{depth}": _var(depth) for depth in (16, 20, 24, 30, 36)}),
    "nvidia/HMAR": Repository(
        {f"hmar-d{depth}": ("vae_ch160v4096z32.pth", f"hmar-d{depth}.pth") for depth in (16, 20, 24, 30)},
        elsewhere={"vae_ch160v4096z32.pth": "FoundationVision/var"},
    ),
    "FoundationVision/LlamaGen": Repository(
        {
            f"c2i_{size}": ("vq_ds16_c2i.pt", f"c2i_{size}.pt")
            for size in ("B_256", "L_256", "B_384", "L_384", "XL_384", "XXL_384", "3B_384")
        }
    ),
    "jiaosiyu1999/FlexVAR": Repository(
        {
            f"flexvar_{size}": ("FlexVAE.pth", f"FlexVAR{size}-{epochs}.pth")
            for size, epochs in (("d16", "epo179"), ("d20", "epo249"), ("d24", "epo349"))
        }
    ),
    "ZGZzz/SAR": Repository(
        {
            f"sar_{size}": ("FlexVAE.pth", f"SAR{size}-{epochs}.pth")
            for size, epochs in (("d16", "epo179"), ("d20", "epo249"), ("d24", "epo349"))
        },
        elsewhere={"FlexVAE.pth": "jiaosiyu1999/FlexVAR"},
    ),
    "peizesun/llamagen_t2i": Repository(
        {
            f"t2i_{stage}": ("vq_ds16_t2i.pt", f"t2i_{stage}.pt")
            for stage in ("XL_stage1_256", "XL_stage2_512")
        }
    ),
    "FoundationVision/Infinity": Repository(
        {
            "125M": ("infinity_vae_d16.pth", "infinity_125M_256x256.pth"),
            "2b": ("infinity_vae_d32reg.pth", "infinity_2b_reg.pth"),
            "8b": ("infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_weights/"),
            "8b_512x512": ("infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_512x512_weights/"),
        }
    ),
    "OliverRen/M-VAR": Repository(  # (unconfirmed) names of all but d32.pth
        {f"m_var_d{depth}": ("vae_ch160v4096z32.pth", f"d{depth}.pth") for depth in (16, 20, 24, 32)},
        elsewhere={"vae_ch160v4096z32.pth": "FoundationVision/var"},
    ),
    "LTH14/mar": Repository(
        {
            f"mar_{size}": ("kl16.ckpt", f"mar_{size}/checkpoint-last.pth")
            for size in ("base", "large", "huge")
        },
        {
            "kl16.ckpt": _dropbox("hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh"),
            "mar_base/checkpoint-last.pth": _dropbox(
                "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb"
            ),
            "mar_large/checkpoint-last.pth": _dropbox(
                "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt"
            ),
            "mar_huge/checkpoint-last.pth": _dropbox(
                "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o"
            ),
        },
    ),
}
"""By the repository's name. No variant has its name twice, so in a folder a variant's name is enough."""

VARIANTS = {name: files for repository in RELEASED.values() for name, files in repository.variants.items()}


def pretrained(
    name: str,
    variant: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
) -> Pipeline:
    """What `Pipeline.from_pretrained` gives."""
    if Path(name).is_dir() and holds_files(Path(name)):
        return from_files(Path(name), variant, dtype, offload)
    repository = {known.lower(): known for known in RELEASED}.get(name.lower())
    if repository is not None:
        return _from_repository(repository, variant, revision, dtype, offload)
    if variant is not None:
        raise UserError(
            f"model {name!r} has no variants, and {variant!r} was asked for; {', '.join(RELEASED)} have"
        )
    if name in bundled() or Path(name).is_dir():
        return load(name, dtype, offload)
    try:
        folder = fetched(name, revision, ("*.json", "*.safetensors", "*.md"))
    except NotFetched as error:
        raise UserError(
            f"model {name!r} is neither a bundled model nor a folder, and it could not be fetched from the "
            f"Hugging Face hub ({error}); check the name and the network, or download the folder elsewhere and give "
            "its path"
        ) from error
    return Pipeline.from_folder(folder, dtype, offload)


def holds_files(folder: Path) -> bool:
    """Whether a folder holds published checkpoints rather than a model of varkit's."""
    return not (folder / CONFIG).is_file() and bool(
        _checkpoints(folder) or any(not _missing(folder, files) for files in VARIANTS.values())
    )


def from_files(
    folder: Path, variant: str | None = None, dtype: str | None = None, offload: str | None = None
) -> Pipeline:
    """The published model in a folder: a variant's files, or all there are where they are of one model."""
    return _converted(_chosen(folder, variant), dtype, offload)


def _converted(files: Sequence[Path], dtype: str | None, offload: str | None) -> Pipeline:
    from varkit.hub.published import pipeline_from_published

    if offload is not None:
        names = " ".join(repr(str(file)) for file in files)
        raise UserError(
            f"published files cannot be offloaded, varkit folders can; run: varkit convert {names} --out DIR"
        )
    return pipeline_from_published(files, dtype)


def expanded(path: StrPath) -> list[Path]:
    """The published files that a path stands for: itself, or those of a folder."""
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    if (folder / CONFIG).is_file():
        raise UserError(f"{str(path)!r} is a folder of varkit's already; load it as it is")
    if not (files := _chosen(folder, None)):
        raise UserError(
            f"the folder {str(path)!r} holds no checkpoint ({', '.join(SUFFIXES)}); give the files of the tokenizer "
            "and the generator"
        )
    return files


def _chosen(folder: Path, variant: str | None) -> list[Path]:
    if variant is None:
        whole = [name for name, files in VARIANTS.items() if not _missing(folder, files)]
        if len(whole) > 1:
            raise UserError(
                f"the folder {str(folder)!r} holds the models {', '.join(whole)}; give from_pretrained a variant=, or "
                "keep each in a folder of its own"
            )
        return _expanded(folder, VARIANTS[whole[0]]) if whole else _checkpoints(folder)
    if variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    if missing := _missing(folder, VARIANTS[variant]):
        raise UserError(f"the folder {str(folder)!r} lacks {', '.join(missing)} of {variant!r}; put it there")
    return _expanded(folder, VARIANTS[variant])


def _from_repository(
    name: str, variant: str | None, revision: str | None, dtype: str | None, offload: str | None
) -> Pipeline:
    repository = RELEASED[name]
    if variant is None:
        known = ", ".join(repository.variants)
        raise UserError(
            f"{name!r} holds several models; choose one by variant=, or {name}:VARIANT on the command line: {known}"
        )
    if variant not in repository.variants:
        raise unknown_name("variant", variant, repository.variants, f"(of {name!r})")
    files = repository.variants[variant]
    try:
        if repository.addresses:
            raise NotFetched("it is not on the Hugging Face hub")
        found = _found(name, files, revision)
    except NotFetched as error:
        where = " and ".join(f"{file} from {_address(name, file)}" for file in files)
        raise UserError(
            f"{variant!r} of {name!r} could not be fetched ({error}); fetch {where}, put them into one "
            "folder under these names, and give that folder in place of the name"
        ) from error
    return _converted(found, dtype, offload)


def _found(name: str, files: Sequence[str], revision: str | None) -> list[Path]:
    """A variant's files, from the repositories they are in; the revision is of the one named."""
    homes = {file: RELEASED[name].elsewhere.get(file, name) for file in files}
    folders = {}
    for home in dict.fromkeys(homes.values()):
        patterns = [file + "*" if file.endswith("/") else file for file in files if homes[file] == home]
        folders[home] = Path(fetched(home, revision if home == name else None, patterns))
    if missing := [file for file in files if _missing(folders[homes[file]], (file,))]:
        raise NotFetched(f"no {' and no '.join(missing)} in its cache or at this revision")
    return [path for file in files for path in _expanded(folders[homes[file]], (file,))]


def _address(name: str, file: str) -> str:
    """Where a person finds a published file, or a folder of shards."""
    kind = "tree" if file.endswith("/") else "resolve"
    home = RELEASED[name].elsewhere.get(file, name)
    on_the_hub = f"https://huggingface.co/{home}/{kind}/main/{file.rstrip('/')}"
    return RELEASED[name].addresses.get(file, on_the_hub)


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [file for file in files if not _expanded(folder, (file,))]


def _expanded(folder: Path, files: Sequence[str]) -> list[Path]:
    """The files that there are; a folder stands for the checkpoints in it."""
    found: list[Path] = []
    for file in files:
        path = folder / file
        found += _checkpoints(path) if file.endswith("/") else [path] if path.is_file() else []
    return found


def _checkpoints(folder: StrPath) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*") if path.suffix in SUFFIXES)
