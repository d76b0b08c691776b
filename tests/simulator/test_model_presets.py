"""Model presets: every value has a source, and they say what the published files say."""

from __future__ import annotations

import pytest

from simulator.model_presets import ModelSpec, load_model_spec, model_names
from tracer.errors import UserError

# name: layers, layers with routed experts, E, K, groups, kept, parameters of an expert, mebibytes of it
PUBLISHED = {
    "llada2-mini": (20, 19, 256, 8, 8, 4, 3_145_728, 6),
    "llada2-flash": (32, 31, 256, 8, 8, 4, 12_582_912, 24),
    "sdar-30b-a3b": (48, 48, 128, 8, 1, 1, 4_718_592, 9),
    "llada-moe-7b-a1b": (16, None, 64, 8, 1, 1, None, None),
    "diffusiongemma-26b-a4b": (30, None, 128, 8, 1, 1, None, None),
}


def test_the_five_published_models_are_there():
    assert model_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_say_what_was_published(name):
    model = load_model_spec(name)
    layers, moe_layers, experts, top_k, groups, kept, params, mebibytes = PUBLISHED[name]
    assert (model.num_layers, model.num_experts, model.top_k) == (layers, experts, top_k)
    assert (model.n_group, model.topk_group, model.expert_params) == (groups, kept, params)
    assert (None if model.moe_layers is None else len(model.moe_layers)) == moe_layers
    assert model.expert_bytes == (None if mebibytes is None else mebibytes * 2**20)
    if params is not None:
        assert params == 3 * model.hidden_size * model.moe_intermediate_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_and_no_other_has_a_source(name):
    model = load_model_spec(name)
    fields = set(ModelSpec.__annotations__) - {"name", "description", "sources"}
    given = {field for field in fields if getattr(model, field) is not None}
    assert set(model.sources) == given
    assert all(len(source) > 10 for source in model.sources.values())
    assert model.description


def test_what_is_not_published_is_left_out():
    assert load_model_spec("diffusiongemma-26b-a4b").mask_id is None
    assert load_model_spec("sdar-30b-a3b").eos_id is None
    assert load_model_spec("llada-moe-7b-a1b").num_heads is None
    assert load_model_spec("sdar-30b-a3b").routed_scaling_factor is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[top_k]\nvalue = 8\n", r"model file my.toml: top_k\.source is missing: it must be a text that says where"),
        ('[top_k]\nvalue = 8\nsource = " "\n', r"my.toml: top_k\.source must be a text that says where .*, not ' '"),
        ('[top_k]\nsource = "x"\n', r"my.toml: top_k\.value is missing: it must be a whole number from 1\."),
        ("top_k = 8\n", r"my.toml: top_k must be a table \[top_k\] with value and source, not 8"),
        ('[top_k]\nvalue = 0\nsource = "x"\n', r"my.toml: top_k\.value must be a whole number from 1, not 0\."),
        ('[top_k]\nvalue = 8.0\nsource = "x"\n', r"top_k\.value must be a whole number from 1, not 8\.0"),
        ('[top_k]\nvalue = true\nsource = "x"\n', r"top_k\.value must be a whole number from 1, not True"),
        ('[mask_id]\nvalue = -1\nsource = "x"\n', r"mask_id\.value must be a whole number from 0, not -1"),
        ('[threshold]\nvalue = nan\nsource = "x"\n', r"threshold\.value must be a number above 0, not nan"),
        ('[expert_bias]\nvalue = 1\nsource = "x"\n', r"expert_bias\.value must be true or false, not 1"),
        ('[score_function]\nvalue = "relu"\nsource = "x"\n', "must be softmax or sigmoid, not 'relu'"),
        ('[model_type]\nvalue = ""\nsource = "x"\n', r"model_type\.value must be a text, not ''"),
        ('[experts]\nvalue = 8\nsource = "x"\n', "my.toml: it has an unknown entry experts, did you mean num_experts"),
        ("[wheels]\n", "my.toml: it has an unknown entry wheels; it takes model_type, class_name, .*threshold"),
        ("[wheels]\n[top_k]\n", r"wheels; it takes .*; top_k\.value is missing: .*; top_k\.source is missing: "),
        ("[top_k", "my.toml is not TOML"),
    ],
)
def test_files_that_break_the_rules_are_refused(tmp_path, text, reason):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_model_spec(str(path))


def test_a_file_of_ones_own_loads(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('[num_layers]\nvalue = 3\nsource = "mine"\n\n[num_dense_layers]\nvalue = 1\nsource = "mine"\n')
    model = load_model_spec(str(path))
    assert (model.name, model.moe_layers, model.sources["num_layers"]) == ("my", (1, 2), "mine")


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="no model preset 'gpt'; there are diffusiongemma-26b-a4b, llada-moe-7b-a1b"):
        load_model_spec("gpt")
