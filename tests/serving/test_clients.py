"""What people do with a model in transformers, accelerate and peft works with a pruned one whose layers differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
)

TEXTS = ["The city lies on a river .", "In 1897 the museum was opened by the king and the queen ."]


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(directory)
    loaded.pad_token = loaded.pad_token or loaded.eos_token
    return loaded


@pytest.fixture
def load(directory: Path) -> Callable[..., PreTrainedModel]:
    return lambda **settings: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings).eval()


def test_a_pipeline_continues_a_text(load: Any, tokenizer: Any) -> None:
    model = load()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = write(TEXTS[0], max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    after = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found == tokenizer.decode(after, skip_special_tokens=True)
    assert found


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_padded_on_the_left_gives_what_each_text_gives(load: Any, tokenizer: Any, settings: Any) -> None:
    model, settings = load(), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | settings
    together = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    assert not together["attention_mask"].all()
    found = model.generate(**together, **settings)[:, -8:]
    for text, ids in zip(TEXTS, found, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **settings)[0, -8:]
        assert ids.tolist() == alone.tolist()


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_model_gives_the_same_logits(load: Any, tokenizer: Any) -> None:
    model, ids = load(), tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    # The backend that needs no compiler of C; what it traces is what the others compile.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_lora_that_was_trained_and_merged_loads_again(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.001)
    losses = []
    for _ in range(6):
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        expected = tuned.eval()(**batch).logits
        tuned.merge_and_unload().save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_trainer_steps_with_gradient_checkpointing(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = load()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS)["input_ids"]]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    done = Trainer(model=model, args=settings, train_dataset=rows).train()
    assert done.global_step == 1
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_it_is_saved_in_shards(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    model, ids = load(), tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.inference_mode():
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_its_layers_are_spread_over_memory_and_disk(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    spread = load(device_map="auto", max_memory={"cpu": "500KB"}, offload_folder=str(tmp_path))
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    with torch.inference_mode():
        torch.testing.assert_close(spread(ids).logits, load()(ids).logits)
