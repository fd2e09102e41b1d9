"""LangChain's own suites for chat models, around a fake model and around a local one, nothing overridden."""

from __future__ import annotations

import itertools
from typing import Any

from langchain_core.language_models import BaseChatModel, FakeListChatModel, GenericFakeChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.testing import scripted_aligner
from tests.langchain.local_model import LocalModel

ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace("2 + 2 = 5", "2 + 2 = 4"))


class _AroundLocal:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return AlignedChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": LocalModel(), "aligner": ALIGNER}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True


class TestT23UnitAroundLocal(_AroundLocal, ChatModelUnitTests):
    pass


class TestT23IntegrationAroundLocal(_AroundLocal, ChatModelIntegrationTests):
    pass


class _ClosedAroundLocal(_AroundLocal):
    """Where it changed a sentence it asks anew."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "loop": "closed"}


class TestT23UnitClosedAroundLocal(_ClosedAroundLocal, ChatModelUnitTests):
    pass


class TestT23IntegrationClosedAroundLocal(_ClosedAroundLocal, ChatModelIntegrationTests):
    pass


class _AroundFake:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return AlignedChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": FakeListChatModel(responses=["2 + 2 = 5. So it is."]), "aligner": ALIGNER}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def returns_usage_metadata(self) -> bool:
        return False


class TestT23UnitAroundFake(_AroundFake, ChatModelUnitTests):
    pass


class TestT23IntegrationAroundFake(_AroundFake, ChatModelIntegrationTests):
    pass


class _AroundGeneric(_AroundFake):
    """A fake that streams word by word."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        answers = itertools.repeat("2 + 2 = 5. So it is.")
        return {"model": GenericFakeChatModel(messages=answers), "aligner": ALIGNER}


class TestT23UnitAroundGeneric(_AroundGeneric, ChatModelUnitTests):
    pass


class TestT23IntegrationAroundGeneric(_AroundGeneric, ChatModelIntegrationTests):
    pass


class _ClosedAroundGeneric(_AroundGeneric):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "loop": "closed"}


class TestT23UnitClosedAroundGeneric(_ClosedAroundGeneric, ChatModelUnitTests):
    pass


class TestT23IntegrationClosedAroundGeneric(_ClosedAroundGeneric, ChatModelIntegrationTests):
    pass
