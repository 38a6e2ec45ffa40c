"""Every setting once: its unit in its name, its default, its range, and how to choose it.

`serve_config.yaml` gives them as the application's `args`. How many replicas there are, and on which resources,
is Serve's own business and stands in the `deployments` section of the same file.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ModelName = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9._:-]+)*$")
]

# The name under which the source `embedded` is served.
EMBEDDED_ID = "sentence-transformers/all-MiniLM-L6-v2"


class Frozen(BaseModel):
    """Settings do not change after they were checked, and a name that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Frozen):
    """One model: where its weights come from and how it is computed."""

    id: ModelName = Field(
        default="Mihaiii/Ivysaur",
        description="The name that clients send, and the repository on the hub when `sources` names the hub.",
    )
    aliases: tuple[ModelName, ...] = Field(
        default=(),
        description="Further names for this model. They answer only while the model itself is served, never its "
        "stand-in.",
    )
    sources: tuple[str, ...] = Field(
        default=("hub",),
        min_length=1,
        description="Where to look for the weights, in order: `hub`, a folder's absolute path, or `embedded` (the "
        "all-MiniLM-L6-v2 that a Python package carries, served under its own name). On a cluster name one source, so "
        "that a fault is loud.",
    )
    revision: str = Field(
        default="main",
        description="The hub's commit, tag or branch. Pin a commit in production, or two replicas may load two models.",
    )
    engine: Literal["auto", "openvino", "torch", "sleep"] = Field(
        default="auto",
        description="`auto` takes torch where the replica has a CUDA device, else OpenVINO, else torch. `sleep` only "
        "takes time, for tests of scale: its vectors are not the model's.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="`auto` takes bfloat16 where the processor computes in it, else float16 on a GPU, else float32.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=3,
        description="Tokens of a text that count; what is longer is cut, and a header says so. Unset, the model's own "
        "limit; never over its position embeddings.",
    )
    normalize: bool = Field(default=True, description="Scale vectors to length 1, as OpenAI's are.")
    batch_tokens: int = Field(
        default=1280,
        ge=64,
        le=1 << 18,
        description="Most tokens in one batch, and most that one call carries. Larger feeds a GPU better (65,536), "
        "smaller takes less memory (1,280 are 0.1 to 0.2 s of one core).",
    )
    bulk_share: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Share of the processor that requests of more tokens than one text may have keep while shorter "
        "ones want all of it; these go first. On a GPU the two take turns.",
    )

    @property
    def slug(self) -> str:
        """The last part of the id, which names this model's deployments: `Tokenizer-Ivysaur`, `Model-Ivysaur`."""
        return self.id.rsplit("/", 1)[-1]


class Settings(Frozen):
    """The whole service."""

    models: tuple[ModelSettings, ...] = Field(
        default=(ModelSettings(),),
        min_length=1,
        description="The models to serve; each gets a Tokenizer and a Model deployment of its own.",
    )
    max_inputs: int = Field(default=2048, ge=1, description="Most inputs in one request; OpenAI's limit is 2,048.")
    max_request_tokens: int = Field(
        default=300_000, ge=1, description="Most tokens in one request, all inputs together; OpenAI's limit is 300,000."
    )
    max_body_bytes: int = Field(
        default=16 << 20,
        ge=1024,
        description="Largest request body, of which each ingress holds at most 16 at once. 300,000 tokens of English "
        "are about 1.5 MB, so 16 MiB refuse only slips.",
    )
    request_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="After this long a request is given up, wherever it is. OpenAI's clients wait 600 s and retry; a "
        "search box wants a second or two.",
    )
    keys_file: str | None = Field(
        default=None,
        pattern="^/",
        description="Absolute path of the file of key hashes that `python -m serve_app.keys` writes. Unset, the "
        "service is open to all.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="Web pages' origins that may call from a browser, such as `https://app.example.com`; `*` is any.",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Settings":
        names = [name for model in self.models for name in (model.id, *model.aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: the name {twice[0]!r} stands for two models; give each id and alias once")
        slugs = [model.slug for model in self.models]
        same = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        if same:
            raise ValueError(f"models: two ids end in {same[0]!r}, which names their deployments; rename one")
        return self


def table(kind: type[Frozen]) -> str:
    """A Markdown table of the settings, as the README shows it."""
    rows = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "one, Ivysaur" if name == "models" else f"`{json.dumps(default)}`"
        rows.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(["| setting | default | what it does, and how to choose it |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(f"{table(Settings)}\n\nOf each model:\n\n{table(ModelSettings)}")
