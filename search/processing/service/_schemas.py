"""Bodies of requests and answers, as the OpenAPI page shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from alphasmith.objectives.literals import MediaKind


class Closed(BaseModel):
    """No fields but those that are named."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Texts(Closed):
    """Texts to classify."""

    texts: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1)]


class ClassShare(Closed):
    """A class and how probable it is."""

    index: int = Field(ge=0, description="Number of the class.")
    name: str
    probability: float = Field(ge=0, le=1)


class ItemClassified(Closed):
    """What the model says of an item."""

    name: str = Field(description="Name of the file, or a number for a text.")
    top: list[ClassShare] = Field(
        description="The most probable classes; of equal ones that of the lowest number first."
    )
    probabilities: list[float] | None = Field(description="Of all classes by number, where they were asked for.")
    notes: list[str] = Field(description="What was done to the item that one might not expect.")


class ItemRefused(Closed):
    """An item that could not be classified; the others of its request are none the worse."""

    name: str
    error: str = Field(description="What is wrong and what to do, in one line.")


class Answer(Closed):
    """One result for each item, in their order."""

    run: str = Field(description="Id of the run that made the model.")
    results: list[ItemClassified | ItemRefused]


class Problem(Closed):
    """A request that was refused."""

    reason: str = Field(description="What is wrong and what to do, in one line.")


class MetricPair(Closed):
    """A task metric as the run measured it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    float_model: float | None = Field(alias="float")
    quantized: float | None


class ModelFacts(Closed):
    """What is served."""

    run: str = Field(description="Id of the run that made the model.")
    run_name: str
    name: str = Field(description="Name of the float model.")
    kind: MediaKind = Field(description="What it takes.")
    classes: list[str] | None = Field(description="Names by number; null: not known before the first answer.")
    scheme: str = Field(description="Quantization scheme.")
    parameters: int
    finished: str = Field(description="When it was written, ISO 8601.")
    metrics: dict[str, MetricPair]
    digests: dict[str, str] = Field(description="File that decides what is computed -> sha256.")
    notes: list[str]


class Health(Closed):
    """Whether requests are answered."""

    status: Literal["ok", "stopping"]
