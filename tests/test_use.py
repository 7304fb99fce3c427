"""The examples in docs/use.md run as written where slimllm is not installed, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig, prune
from orchestrator.builtin import MODEL_DIR
from tests.elsewhere import Elsewhere

PAGE = Path(__file__).parents[1] / "docs" / "use.md"
# What the page says of the examples, in their own names.
CHECKS = """
import torch
assert hidden_states.shape == (1, batch["input_ids"].shape[1], model.config.hidden_size)
print(len(tuned.base_model.targeted_module_names))
from transformers import AutoModelForSequenceClassification
whole = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
assert torch.equal(hidden_states, whole.base_model(**batch).last_hidden_state)
try:
    AutoModelForSequenceClassification.from_pretrained(pruned, trust_remote_code=True)
except ValueError:
    print("refused")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, elsewhere: Elsewhere) -> tuple[Path, list[str]]:
    """A folder where the page's examples ran on a pruned model, and what they printed."""
    folder = tmp_path_factory.mktemp("use")
    output, small = (
        folder / "pruned" / "model-0.2",
        {"samples": 4, "sequence_length": 64, "evaluate_tokens": 64, "local": True},
    )
    prune(PruneConfig(model=str(MODEL_DIR), output=str(output), tracking_uri="none", **small))
    examples = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    ended = elsewhere.run(examples + CHECKS, folder)
    assert ended.code == 0, ended.stderr
    return folder, ended.stdout.splitlines()


def test_every_linear_map_of_every_layer_is_tuned(printed: tuple[Path, list[str]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    maps = [one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]
    assert printed[1][0] == str(len(maps))


def test_a_class_with_another_head_is_refused(printed: tuple[Path, list[str]]) -> None:
    assert printed[1][1] == "refused"


def test_what_was_tuned_loads_and_is_the_pruned_model_before_any_step(printed: tuple[Path, list[str]]) -> None:
    folder, _ = printed
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        pruned, tuned = (
            AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits for name in ("pruned/model-0.2", "tuned")
        )
    torch.testing.assert_close(tuned, pruned)
