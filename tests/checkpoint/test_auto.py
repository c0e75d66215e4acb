"""transformers' own ways to load a model, on merged and saved checkpoints: with the memory, or an error."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_checkpoints import as_published, attached, edit_config, logits, publish
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    pipeline,
)

import ahn
from ahn import tiny
from ahn.checkpoint import from_pretrained, merge


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(base, adapter, tmp_path_factory.mktemp("auto") / "merged")


@pytest.fixture(scope="module")
def wanted(merged: Path) -> torch.Tensor:
    return logits(from_pretrained(merged))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))


def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_auto_classes_load_the_memory(merged: Path, wanted: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model) is Qwen2ForCausalLM and torch.equal(logits(model), wanted)
    model, report = AutoModelForCausalLM.from_pretrained(str(merged), output_loading_info=True, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not report["missing_keys"] and hasattr(model, "ahn_config")
    config = AutoConfig.from_pretrained(merged)
    assert (config.model_type, config.hidden_size, config.layer_types[0]) == ("ahn", 32, "full_attention")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(merged, config=config)), wanted)
    with pytest.raises(ahn.AHNError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config)


def test_a_saved_configuration_is_the_checkpoints(merged: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(merged).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    block = json.loads((merged / "config.json").read_text())["ahn"]
    assert (again.model_type, again.ahn, again.hidden_size) == ("ahn", block, 32)


def test_pipeline_loads_the_memory(tmp_path: Path) -> None:
    whole = merge(tiny.path(), tiny.adapter_path("gated_deltanet"), tmp_path / "merged")
    made = pipeline("text-generation", model=str(whole))
    assert made.model.ahn_config.memory == "gated_deltanet"
    assert made("def", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("def")
    assert len(AutoTokenizer.from_pretrained(whole)) == 4096


def test_as_trainers_look_it_up(merged: Path, wanted: torch.Tensor) -> None:
    import transformers

    (name,) = AutoConfig.from_pretrained(merged).architectures
    assert torch.equal(logits(getattr(transformers, name).from_pretrained(merged)), wanted)


def save(model: PreTrainedModel, way: str, folder: Path) -> Path:
    """A model as its user saves it; the file says what it is, the configuration in memory stays the base's."""
    if way == "save_adapter":
        ahn.save_adapter(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if way == "shards" else "5GB")
    assert model.config.model_type == "qwen2" and "save_pretrained" not in vars(model.config)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "ahn"
    return folder


BEFORE_AHN = """
import sys, torch, transformers, peft
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2ForCausalLM
merged, wanted, tests, *saved = sys.argv[1:]

assert Qwen2ForCausalLM.from_pretrained(merged).config.hidden_size == 32
try:
    AutoModelForCausalLM.from_pretrained(merged)
except ValueError as error:
    assert "model type `ahn`" in str(error), error
else:
    raise AssertionError("loaded by a transformers that does not know it")

owners = [peft.PeftModel, PreTrainedConfig, transformers.PreTrainedModel, AutoConfig, AutoModelForCausalLM]
before = [dict(vars(owner)) for owner in owners]
import ahn
for owner, was in zip(owners, before):
    assert [key for key in was if vars(owner)[key] is not was[key]] == [], owner

sys.path.append(tests)
from tiny_checkpoints import logits
for path, (numbers, config) in zip([merged, *saved], torch.load(wanted, weights_only=False), strict=True):
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(model), numbers) and model.ahn_config == config, path
"""


def test_a_process_before_and_after_it_imports_ahn(merged: Path, base: Path, tmp_path: Path) -> None:
    """Before, no class loads it in silence: Auto classes do not know the type; classes of base models take the base's
    own sizes, warn of the type, and list the weights that they do not know. Importing replaces nothing of others. After
    it, whatever a model saved is loaded with its memory.
    """
    models = {way: attached(base, router=True) for way in ("save_pretrained", "save_adapter", "shards")}
    models["without parameters"] = attached(base, memory="window_only")
    saved = [save(model, way, tmp_path / way) for way, model in models.items()]
    wanted = [(logits(model), model.ahn_config) for model in (from_pretrained(merged), *models.values())]
    torch.save(wanted, tmp_path / "wanted")
    done = run(BEFORE_AHN, merged, tmp_path / "wanted", Path(__file__).parent, *saved)
    assert done.returncode == 0, done.stderr
    assert "type `ahn` to instantiate a model of type `qwen2`" in done.stderr and "UNEXPECTED" in done.stderr


MODULES = ("processing_utils", "models.auto.modeling_auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        *(f"import ahn, transformers.{first}, transformers.{last}" for first, last in (MODULES, MODULES[::-1])),
        "import ahn",
        "import transformers",
        "from transformers import AutoModelForCausalLM",
        # as `transformers serve`: the class is asked for before the module of the Auto classes of models is there
        "import ahn, sys, transformers\ntransformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "transformers.AHNForCausalLM",
    ],
)
def test_the_order_of_imports_does_not_matter(merged: Path, first: str) -> None:
    """The Auto classes load the memory, and transformers, which makes itself anew for its processors, has its class."""
    done = run(
        f"{first}\nimport ahn, sys, transformers\nfrom transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).ahn_config.memory)\n"
        "print(transformers.AHNForCausalLM.__module__)",
        merged,
    )
    assert done.stdout == "gated_deltanet\nahn.auto.classes\n", done.stderr


def test_saving_twice_and_detaching(base: Path, tmp_path: Path) -> None:
    model = attached(base)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base and config["ahn"]["base_model_type"] == "qwen2"
    ahn.detach(again).save_pretrained(tmp_path / "again")
    plain = json.loads((tmp_path / "again" / "config.json").read_text())
    assert plain["model_type"] == "qwen2" and not hasattr(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again"), "ahn_config"
    )


def test_a_state_dict_without_the_memory_is_not_saved_as_one(base: Path, tmp_path: Path) -> None:
    model = attached(base)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".ahn." not in name}
    with pytest.raises(ahn.AHNError, match=r"lacks 2\d tensors of the AHN"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())


def test_trainers_save_the_memory(base: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    model = attached(base)
    wanted = logits(model)
    Trainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])).save_model(str(tmp_path / "a"))
    accelerator = Accelerator(cpu=True)
    unwrapped = accelerator.unwrap_model(accelerator.prepare(torch.nn.DataParallel(model)))
    unwrapped.save_pretrained(tmp_path / "b", state_dict=accelerator.get_state_dict(unwrapped))
    for path in (tmp_path / "a", tmp_path / "b"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(path)), wanted)  # trainers use no cache


def test_peft(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(attached(base), lora)
    wanted = logits(wrapped)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), wanted, atol=1e-5)
    with pytest.warns(UserWarning, match="holds the PEFT adapter alone. The AHN is saved by ahn.save_adapter"):
        peft.get_peft_model(attached(base), lora).save_pretrained(tmp_path / "alone")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.get_peft_model(ahn.detach(attached(base)), lora).save_pretrained(tmp_path / "plain")
    model = attached(base)
    try:
        model.add_adapter(lora)
    except ValueError as error:  # transformers 5.24 asks for a PEFT that is not out yet
        pytest.skip(str(error))
    with pytest.warns(UserWarning, match="ahn.save_adapter"):
        model.save_pretrained(tmp_path / "lora")


class Hub:
    """What an upload asks of the Hub, and where it puts it."""

    def __init__(self, place: Path) -> None:
        self.place, self.asked = place, dict[str, object]()

    def __call__(self, token: object = None) -> Hub:
        self.asked["token"] = token
        return self

    def create_repo(self, name: str, **kwargs: object) -> object:
        self.asked |= kwargs
        return type("Repo", (), {"repo_id": name if "/" in name else f"me/{name}"})

    def file_exists(self, name: str, file: str) -> bool:
        return (self.place / file).exists()

    def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: object) -> str:
        self.asked |= kwargs
        shutil.copytree(folder_path, self.place, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing_sends_what_loads_with_a_card(
    way: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy_of: Callable[[Path], Path]
) -> None:
    """Licence and metrics stand in the card where they are known: in the base's card, and beside the adapter."""
    own = copy_of(base)
    (own / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    adapter = ahn.save_adapter(attached(own), tmp_path / "adapter")
    (adapter / "results.json").write_text(json.dumps({"after": {"eval_kl": 0.125, "eval_ce": 2.5, "eval_loss": "x"}}))
    model = from_pretrained(adapter, base=own)
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("ahn.model.pushing.HfApi", hub)
    if way == "push_to_hub":
        assert model.push_to_hub("memory", private=True, token="t", tags=["mine"]) == "https://hub/me/memory"
        assert hub.asked["private"] and hub.asked["token"] == "t"
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="memory", tags=["mine"])
    card = (hub.place / "README.md").read_text()
    assert "license: mit" in card and "artificial-hippocampus-network, mine" in card and "| 0.1250 |" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/memory")' in card and "import ahn" in card
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(hub.place)), logits(model))
    (hub.place / "README.md").write_text("ours")
    model.push_to_hub("memory")
    assert (hub.place / "README.md").read_text() == "ours", "a card that is there is kept"
    with pytest.raises(ahn.AHNError, match="takes no colour"):
        model.push_to_hub("memory", colour="red")
    ahn.detach(model)
    assert model.push_to_hub.__func__ is type(model).push_to_hub


def test_the_card_names_a_base_from_the_hub(base: Path) -> None:
    from ahn.model.pushing import card

    model = attached(base)
    model.name_or_path = model.config.name_or_path = "Qwen/Qwen2.5-0.5B"
    text = card(model, "me/x", [])
    assert "base_model: Qwen/Qwen2.5-0.5B" in text and "license:" not in text and "Held-out" not in text


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["merged", "published", "published adapter", "adapter", "old adapter", "saved"])
def test_classes_of_base_models_refuse_a_memory(
    kind: str, base: Path, adapter: Path, merged: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
) -> None:
    path = adapter if kind == "adapter" else merged
    if kind == "published":
        path = as_published(copy_of(merged))
    elif kind == "published adapter":
        path = publish(copy_of(adapter), use_ahn_router=True, _name_or_path=str(base))
    elif kind == "saved":
        attached(base).save_pretrained(path := tmp_path / "saved")
    elif kind == "old adapter":
        path = edit_config(copy_of(adapter), lambda c: c.update(base_model_name_or_path=str(base)))
        for name in ("model_type", "architectures"):
            edit_config(path, lambda c, name=name: c.update({name: c["ahn"].pop(f"base_{name}")}))
    loads = [Qwen2ForCausalLM, Qwen2Model]
    if json.loads((path / "config.json").read_text())["model_type"] == "qwen2":
        loads.append(AutoModelForCausalLM)
        assert from_pretrained(path).ahn_config.router
    for load in loads:
        with pytest.raises(ahn.AHNError, match=r"has an AHN, which Qwen2\w+ would leave out"):
            load.from_pretrained(path)
    with pytest.raises(ahn.AHNError, match="would leave out"):
        Qwen2ForCausalLM(Qwen2Config.from_pretrained(path))
    assert type(Qwen2ForCausalLM.from_pretrained(base)) is Qwen2ForCausalLM, "other checkpoints load as ever"


def test_configurations_of_others_may_have_such_names() -> None:
    """A model of somebody's may have a memory and sinks of its own."""
    config = Qwen2Config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=9)
    config.memory, config.sinks, config.window = "lstm", 4, 8
    assert type(Qwen2Model(config)) is Qwen2Model


def test_configurations_from_before_name_the_base_without_a_prefix(
    merged: Path, wanted: torch.Tensor, copy_of: Callable[[Path], Path]
) -> None:
    path = copy_of(merged)
    for name in ("model_type", "architectures"):
        edit_config(path, lambda c, name=name: c["ahn"].update({name: c["ahn"].pop(f"base_{name}")}))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), wanted)
    with pytest.raises(ahn.AHNError, match="would leave out"):
        Qwen2ForCausalLM.from_pretrained(path)


def test_an_adapter_without_its_base_says_so(adapter: Path, copy_of: Callable[[Path], Path]) -> None:
    alone = edit_config(copy_of(adapter), lambda config: config.update(base_model_name_or_path=None))
    with pytest.raises(ahn.AHNError, match="does not say which base model"):
        AutoModelForCausalLM.from_pretrained(alone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_pickled_model_loads_in_a_new_process(base: Path, tmp_path: Path, way: str, merged: Path) -> None:
    import pickle

    model = from_pretrained(merged)
    torch.save(logits(model), tmp_path / "wanted")
    if way == "torch.save":
        torch.save(model, tmp_path / "model")
    else:
        (tmp_path / "model").write_bytes(pickle.dumps(copy.deepcopy(model) if way == "deepcopy" else model))
    load = (
        "torch.load(sys.argv[1], weights_only=False)" if way == "torch.save" else "pickle.load(open(sys.argv[1], 'rb'))"
    )
    done = run(
        f"import pickle, sys, torch\nmodel = {load}\nsys.path.append(sys.argv[3])\n"
        "from tiny_checkpoints import logits\nassert torch.equal(logits(model), torch.load(sys.argv[2]))",
        tmp_path / "model",
        tmp_path / "wanted",
        Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr


SERVE = "import ahn; from transformers.cli.transformers import main; main()"


@pytest.mark.slow
def test_transformers_serve_reads_with_the_memory(tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    whole = merge(tiny.path(), tiny.adapter_path("deltanet"), tmp_path / "merged")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(whole, dtype="float32"),
        AutoTokenizer.from_pretrained(whole),
    )
    model.ahn_config = model.ahn_config.replace(window=28, sinks=4)
    model.save_pretrained(whole)
    text = "import os\nname = 'x'\n" * 12
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected, without = (
        each.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        for each in (model, AutoModelForCausalLM.from_pretrained(tiny.path(), dtype="float32"))
    )
    assert not torch.equal(expected, without)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            request = {"model": str(whole), "prompt": text, "max_tokens": 12, "temperature": 0}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=request, timeout=120)
        finally:
            server.terminate()
    assert answer.status_code == 200, (tmp_path / "log").read_text()
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "packing_strategy": "bfd"}, {"gradient_checkpointing": True}]
)
def test_trl_trains_the_memory_of_a_checkpoint(settings: dict[str, object], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    whole = merge(tiny.path(), tiny.adapter_path("deltanet"), tmp_path / "merged")
    rows = datasets.Dataset.from_list([{"text": "import os\nprint(os.name)\n" * 20}] * 4)
    options = {"gradient_checkpointing": False, "max_length": 128, "max_steps": 1, "bf16": False, "use_cpu": True}
    given = options | {"report_to": [], "save_strategy": "no"} | settings
    trainer = trl.SFTTrainer(str(whole), args=trl.SFTConfig(str(tmp_path / "run"), **given), train_dataset=rows)
    ahn.set_window(trainer.model, 28, 4)
    before = {name: p.detach().clone() for name, p in ahn.adapter_parameters(trainer.model).items()}
    trainer.train()
    assert before and not any(torch.equal(p, before[n]) for n, p in ahn.adapter_parameters(trainer.model).items())
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(trainer.model.eval()))


# -- other Auto classes, and what is given beside the name -------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "head", ["Model", "ModelForSequenceClassification", "ModelForTokenClassification", "ModelForQuestionAnswering"]
)
@torch.no_grad()
def test_other_heads_are_saved_and_loaded_with_their_memory(head: str, base: Path, tmp_path: Path) -> None:
    auto = getattr(transformers, f"Auto{head}")
    torch.manual_seed(0)
    model = auto.from_pretrained(base)
    ahn.attach(model, ahn.AHNConfig(window=13, sinks=3))
    for parameter in ahn.adapter_parameters(model).values():
        parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 42)[None]
    wanted = model(ids)[0]
    for found in (auto.from_pretrained(tmp_path), ahn.from_pretrained(tmp_path)):
        assert type(found) is type(model)
        assert torch.equal(found(ids)[0], wanted)


@torch.no_grad()
def test_a_new_head_is_said(merged: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers, which lists it; logits per token are never made up."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged, num_labels=3)
    assert model(torch.arange(2, 42)[None]).logits.shape == (1, 3) and "score.weight: it is new" in caplog.text
    assert len(ahn.adapter_parameters(model)) > 0
    bare = transformers.AutoModel.from_pretrained(merged)
    assert type(bare).__name__ == "Qwen2Model" and len(ahn.adapter_parameters(bare)) > 0


def test_what_is_given_changes_the_configuration_or_is_refused(merged: Path) -> None:
    changed = AutoConfig.from_pretrained(merged, use_cache=False)
    changed.rms_norm_eps = 1e-3
    for model in (
        AutoModelForCausalLM.from_pretrained(merged, config=changed),
        AutoModelForCausalLM.from_pretrained(merged, use_cache=False, rms_norm_eps=1e-3),
        from_pretrained(merged, use_cache=False, rms_norm_eps=1e-3),
    ):
        assert (model.config.use_cache, model.config.rms_norm_eps, model.config.model_type) == (False, 1e-3, "qwen2")
        assert len(ahn.adapter_parameters(model)) > 0
    changed.num_hidden_layers = 1
    with pytest.raises(ahn.AHNError, match="layers"):
        AutoModelForCausalLM.from_pretrained(merged, config=changed)
    with pytest.raises(ahn.AHNError, match="subfolder= is not supported"):
        AutoModelForCausalLM.from_pretrained(merged.parent, subfolder=merged.name)
    with pytest.raises(ahn.AHNError, match="variant= is not supported"):
        AutoModelForCausalLM.from_pretrained(merged, variant="fp16")


def test_the_attention_of_another_model_with_an_ahn_is_taken_for_the_bases(merged: Path, wanted: torch.Tensor) -> None:
    """Trainers load a reference model with what the configuration of the first one says."""
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(merged, attn_implementation="ahn")), wanted)


@torch.no_grad()
def test_a_lora_that_names_a_merged_checkpoint_as_its_base(merged: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.ahn\..*", init_lora_weights=False)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(merged), lora)
    expected = logits(wrapped)
    with pytest.warns(UserWarning, match="The AHN is saved by"):
        wrapped.save_pretrained(tmp_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    except (ImportError, ValueError) as error:  # this transformers asks for a PEFT that is not out yet
        pytest.skip(str(error))
    assert torch.equal(logits(model), expected) and len(ahn.adapter_parameters(model)) > 0
