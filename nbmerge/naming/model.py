"""The model that config.json describes, as transformers knows it, found on the meta device without weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from nbmerge.errors import ConfigError
from nbmerge.geometry import Shape
from nbmerge.naming.facts import ModelDirectory, ModelFacts
from nbmerge.naming.prefixes import strip_wrappers


class HFModel(ModelDirectory):
    """The model of a directory. Its facts are found when they are first asked for."""

    @cached_property
    def facts(self) -> ModelFacts:
        """What transformers' class says of the model. Imports torch and transformers.

        Raises ConfigError where no class is known or it cannot be made.
        """
        from nbmerge.naming.meta import model_facts

        return model_facts(self)

    @cached_property
    def untied(self) -> HFModel:
        """The same model with embeddings of its own for the head, whatever the config says."""
        return replace(self, tie_word_embedding=False)

    def expected_shape(self, name: str) -> Shape | None:
        """The global shape of a tensor by its in-memory or published name, wrappers' prefixes allowed."""
        facts = self.facts
        for each in (name, strip_wrappers(name)):
            if each in facts.memory:
                return facts.memory[each]
            if each in facts.published:
                return facts.published[each].shape
        return None


def auto_class_name(architecture: str, *, is_value_model: bool = False) -> str:
    """The auto class that loads an architecture, as verl's merger chooses it.

    Raises ConfigError for an architecture of no auto class that checkpoints are merged for.
    """
    if is_value_model or "ForTokenClassification" in architecture:
        return "AutoModelForTokenClassification"
    for ending, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ):
        if ending in architecture:
            return auto
    raise ConfigError(
        f"no auto class is known for the architecture {architecture!r}",
        fix="load the merged directory with the class itself: transformers." + architecture,
    )
