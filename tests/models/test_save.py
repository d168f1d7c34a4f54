"""A saved checkpoint is its parent's in everything but the values of the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.models.families import FAMILIES
from align.models.load import load_model, load_processor
from align.models.save import original_names, save_checkpoint
from align.models.weights import tensor_table
from tests import tiny_models
from tests.models import tiny_valley
from tests.models.test_load import edit

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def processor():
    return load_processor(GOLDEN, max_pixels=100352, default_system=None)


def stored(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_equal_tensors(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def test_an_unchanged_model_is_saved_bit_for_bit(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved")
    assert_equal_tensors(stored(saved), stored(GOLDEN))
    assert tensor_table(saved) == tensor_table(GOLDEN)
    original, written = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, saved))
    auto_map = written.pop("auto_map")
    assert written == original
    assert auto_map["AutoModel"] == "modeling_valley_eagle.ValleyQwen2ForCausalLM"
    for name in ("generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        assert (saved / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert not (saved / "cases.json").exists()


def test_what_is_saved_opens_again_and_may_be_saved_again(model, processor, tmp_path):
    first = save_checkpoint(model, processor, tmp_path / "first")
    again = load_model(first)
    opened = load_processor(first)
    assert (opened.max_pixels, opened.default_system) == (100352, None)
    second = save_checkpoint(again, opened, tmp_path / "second")
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model."],
)
def test_state_dicts_of_wrapped_models_give_the_original_names(prefix, model, processor, tmp_path):
    gathered = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    saved = save_checkpoint(model, processor, tmp_path / "saved", state_dict=gathered)
    assert_equal_tensors(stored(saved), stored(GOLDEN))


def test_checkpointed_blocks_and_original_names_are_understood(model, processor, tmp_path):
    own = model.state_dict()
    wrapped = {
        name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): tensor for name, tensor in own.items()
    }
    original = dict(zip(original_names(own, FAMILIES["ValleyQwen2ForCausalLM"]), own.values(), strict=True))
    assert set(original) == set(stored(GOLDEN))
    for name, state_dict in (("wrapped", wrapped), ("original", original)):
        saved = save_checkpoint(model, processor, tmp_path / name, state_dict=state_dict)
        assert_equal_tensors(stored(saved), stored(GOLDEN))


def test_a_constructed_model_is_saved_under_its_parents_names(model, processor, tmp_path):
    constructed = type(model)(model.config)
    constructed.load_state_dict(model.state_dict())
    saved = save_checkpoint(constructed, processor, tmp_path / "saved", parent=GOLDEN)
    assert_equal_tensors(stored(saved), stored(GOLDEN))


def test_incomplete_weights_are_refused_and_leave_nothing(model, processor, tmp_path):
    partial = dict(model.state_dict())
    del partial["model.norm.weight"]
    partial["model.extra.weight"] = torch.zeros(3)
    message = (
        r"expected the 152 tensors of the parent; missing 1 \(model.norm.weight\), too many 1 \(model.extra.weight\)"
    )
    with pytest.raises(UserError, match=message):
        save_checkpoint(model, processor, tmp_path / "saved", state_dict=partial)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_another_shape_is_refused(model, processor, tmp_path):
    changed = {**model.state_dict(), "model.norm.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"expected model.norm.weight to have the parent's shape \(64,\), found \(3,\)"):
        save_checkpoint(model, processor, tmp_path / "saved", state_dict=changed)


def test_a_checkpoint_is_replaced_as_a_whole(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved", extra_files={"README.md": "old", "old.txt": "old"})
    with pytest.raises(UserError):
        save_checkpoint(model, processor, saved, state_dict={})
    assert (saved / "old.txt").read_text() == "old"
    save_checkpoint(model, processor, saved, extra_files={"README.md": "new"})
    assert (saved / "README.md").read_text() == "new"
    assert not (saved / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_a_killed_save_left_is_cleared_and_the_old_checkpoint_kept(model, processor, tmp_path):
    (tmp_path / ".saved.new-1").mkdir()
    save_checkpoint(model, processor, tmp_path / "saved", extra_files={"old.txt": "old"})
    (tmp_path / "saved").rename(tmp_path / ".saved.old-1")  # killed between the two renames
    with pytest.raises(UserError):
        save_checkpoint(model, processor, tmp_path / "saved", state_dict={})
    assert (tmp_path / "saved" / "old.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_weights_are_sharded_with_an_index(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved", max_shard_size="400KB")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    tensors = stored(GOLDEN)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert_equal_tensors(load_model(saved).state_dict(), model.state_dict())


def test_a_cast_is_noted_in_the_config(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved", dtype=torch.bfloat16)
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(saved).dtype == torch.bfloat16
    assert {info.dtype for info in tensor_table(saved).values()} == {"BF16"}


def test_without_a_parent_the_legacy_keys_are_put_back(tmp_path):
    saved = save_checkpoint(tiny_valley.model(), tiny_valley.processor(), tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (1000000.0, None, "float32")
    assert config["architectures"] == ["ValleyQwen2ForCausalLM"]
    assert any(".vision_model." in name for name in tensor_table(saved))
    opened, made = load_model(saved), tiny_valley.model()
    assert_equal_tensors(opened.state_dict(), made.state_dict())
    assert load_processor(saved).num_image_tokens(300, 180) == tiny_valley.processor().num_image_tokens(300, 180)


def test_switched_off_no_code_travels(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved", code="none")
    assert list(saved.glob("*.py")) == []
    assert json.loads((saved / "config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())


def test_travelling_code_is_not_used_where_this_toolkit_is_installed(model, processor, tmp_path):
    saved = save_checkpoint(model, processor, tmp_path / "saved")
    (saved / "modeling_valley_eagle.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert type(load_model(saved)) is type(model)
    assert type(load_processor(saved)) is type(processor)


def test_transformers_own_models_keep_their_parents_names_and_keys(tmp_path):
    made = tiny_models.llava_onevision()
    parent = save_checkpoint(made, tiny_models.llava_onevision_processor(), tmp_path / "parent")
    config = json.loads((parent / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == made.config.text_config.rope_parameters["rope_theta"]
    assert config["torch_dtype"] == "float32"
    edit(parent / "config.json", a_key_of_the_parent="kept")
    child_model, processor = load_model(parent), load_processor(parent)
    with torch.no_grad():
        child_model.lm_head.weight.add_(1.0)
    child = save_checkpoint(child_model, processor, tmp_path / "child")
    assert json.loads((child / "config.json").read_text()) == json.loads((parent / "config.json").read_text())
    assert tensor_table(child) == tensor_table(parent)
    before, after = stored(parent), stored(child)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    assert "lm_head" in changed[0]
    gathered = {"module." + name: tensor for name, tensor in child_model.state_dict().items()}
    again = save_checkpoint(child_model, processor, tmp_path / "again", state_dict=gathered)
    assert_equal_tensors(stored(again), after)


def test_tied_heads_are_stored_as_the_parent_stores_them(tmp_path):
    made = tiny_models.llava_onevision(tied=True)
    parent = save_checkpoint(made, tiny_models.llava_onevision_processor(), tmp_path / "parent")
    child = save_checkpoint(load_model(parent), load_processor(parent), tmp_path / "child")
    assert tensor_table(child) == tensor_table(parent)
    valley = save_checkpoint(tiny_valley.model(tie_word_embeddings=True), tiny_valley.processor(), tmp_path / "valley")
    assert "lm_head.weight" not in tensor_table(valley)
    opened = load_model(valley)
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()


def test_a_parent_that_transformers_saved_keeps_its_names(tmp_path):
    """They are those in memory, which the published checkpoints do not have."""
    parent = tiny_valley.folder(tmp_path / "parent")
    saved = save_checkpoint(load_model(parent), load_processor(parent), tmp_path / "saved")
    assert_equal_tensors(stored(saved), stored(parent))


@pytest.mark.parametrize("in_state_dict", [True, False])
@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tied_head_that_a_gathered_state_dict_lacks_is_stored_as_the_parent_does(in_state_dict, is_stored, tmp_path):
    parent = tiny_valley.folder(tmp_path / "parent", tie_word_embeddings=True)
    weights = stored(parent)
    if is_stored:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    opened = load_model(parent)
    gathered = {name: tensor for name, tensor in opened.state_dict().items() if in_state_dict or "lm_head" not in name}
    saved = save_checkpoint(opened, load_processor(parent), tmp_path / "saved", state_dict=gathered)
    assert_equal_tensors(stored(saved), weights)


def test_a_tied_head_of_a_model_of_transformers_is_stored_where_the_parent_stores_it(tmp_path):
    tiny_models.llava_onevision(tied=True).save_pretrained(tmp_path / "parent")
    tiny_models.llava_onevision_processor().save_pretrained(tmp_path / "parent")
    weights = stored(tmp_path / "parent")
    embeddings = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights["language_model.lm_head.weight"] = weights[embeddings].clone()
    save_file(weights, tmp_path / "parent" / "model.safetensors", metadata={"format": "pt"})
    opened = load_model(tmp_path / "parent")
    with torch.no_grad():
        opened.get_input_embeddings().weight.mul_(2)
    saved = stored(save_checkpoint(opened, load_processor(tmp_path / "parent"), tmp_path / "saved"))
    assert saved.keys() == weights.keys()
    for name in (embeddings, "language_model.lm_head.weight"):
        assert torch.equal(saved[name], 2 * weights[name])


@pytest.mark.parametrize("native", [True, False])
def test_a_generation_config_that_transformers_would_refuse_is_no_reason_to_lose_a_model(native, tmp_path):
    parent = tmp_path / "parent"
    if native:
        tiny_models.save_llava_onevision(parent, 0)
    else:
        tiny_valley.folder(parent)
    (parent / "generation_config.json").unlink(missing_ok=True)
    model = load_model(parent)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3
    saved = save_checkpoint(model, load_processor(parent), tmp_path / "saved")
    assert json.loads((saved / "generation_config.json").read_text())["temperature"] == 0.3
    assert load_model(saved).generation_config.temperature == 0.3


def test_every_chat_template_and_mistrals_tokenizer_are_carried(model, processor, tmp_path):
    parent = save_checkpoint(model, processor, tmp_path / "parent", code="none")
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (parent / "tekken.json").write_text("{}")
    saved = save_checkpoint(model, processor, tmp_path / "saved", parent=parent)
    assert (saved / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert (saved / "tekken.json").is_file()


def test_only_what_was_left_of_the_same_folder_is_cleared(model, processor, tmp_path):
    for other in (".a.b.new-7", ".[a].new-7"):
        (tmp_path / other).mkdir()
    save_checkpoint(model, processor, tmp_path / "a")
    assert (tmp_path / ".a.b.new-7").is_dir()
    save_checkpoint(model, processor, tmp_path / "[a]")
    assert not (tmp_path / ".[a].new-7").exists()


def linked_parent(tmp_path, name, target):
    """A copy of the golden with one file that is a link."""
    parent = copy_of(GOLDEN, tmp_path / "parent")
    (parent / name).unlink(missing_ok=True)
    (parent / name).symlink_to(target)
    return parent


def copy_of(source, target):
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["LICENSE", "special_tokens_map.json", "additional_chat_templates"])
def test_a_link_out_of_the_parent_is_not_copied_into_the_child(tmp_path, model, processor, name):
    secret = tmp_path / "secret"
    if name.endswith("templates"):
        secret.mkdir()
        (secret / "a.jinja").write_text("a secret")
    else:
        secret.write_text("a secret")
    with pytest.raises(UserError, match=f"expected files inside the folder, found '{name}'"):
        save_checkpoint(model, processor, tmp_path / "child", parent=linked_parent(tmp_path, name, secret))
    assert not (tmp_path / "child").exists()


def test_a_link_in_a_folder_of_the_parent_is_refused_too(tmp_path, model, processor):
    (tmp_path / "secret").write_text("a secret")
    parent = copy_of(GOLDEN, tmp_path / "parent")
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="expected files inside the folder"):
        save_checkpoint(model, processor, tmp_path / "child", parent=parent)


def test_links_inside_the_folder_and_to_the_hub_s_cache_are_followed(tmp_path, model, processor):
    cache = tmp_path / "models--bytedance--valley"
    parent = copy_of(GOLDEN, cache / "snapshots" / "0123")
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abcd").write_text("Apache-2.0")
    (parent / "LICENSE").symlink_to("../../blobs/abcd")
    (parent / "NOTICE").symlink_to("LICENSE")
    child = save_checkpoint(model, processor, tmp_path / "child", parent=parent)
    for name in ("LICENSE", "NOTICE"):
        assert not (child / name).is_symlink()
        assert (child / name).read_text() == "Apache-2.0"


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", "", 5, None])
def test_an_index_names_only_files_beside_it(tmp_path, name):
    folder = copy_of(GOLDEN, tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for look in (tensor_table, load_model):
        with pytest.raises(UserError, match="expected names of files beside the index"):
            look(folder)
