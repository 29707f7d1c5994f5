"""Models of transformers, timm and torchvision's detection zoo: a training step, small, without downloads.

examples/benchmarks/zoo_coverage.py does the same for many more; `pytest -m slow` runs those.
"""

import pytest
import torch
from coverage_models import LIBRARIES, TIMM, TRANSFORMERS, names_of
from coverage_oracle import forward_equal, gradients_equal, product_flops

import fxprop

pytestmark = pytest.mark.usefixtures("memory_given_back")

DETECTION = "fasterrcnn_mobilenet_v3_large_320_fpn raft_small".split()
HF = """BertForSequenceClassification RobertaForMaskedLM DistilBertForMaskedLM GPT2LMHeadModel LlamaForCausalLM
MistralForCausalLM Qwen2ForCausalLM MixtralForCausalLM T5ForConditionalGeneration BartForConditionalGeneration
WhisperForConditionalGeneration ViTForImageClassification CLIPModel Wav2Vec2ForCTC""".split()
SOME_TIMM = "convnext_atto tf_efficientnet_b0 swin_tiny_patch4_window7_224".split()


def check(library, name, gradients=True):
    if library != "torchvision":
        pytest.importorskip(library, reason=f"{library} is an optional extra")
    torch.manual_seed(0)
    model, args, kwargs = LIBRARIES[library](name)
    keys = list(model.state_dict())
    gm, report = fxprop.transform(model, 0.25, args, example_kwargs=kwargs)
    assert list(gm.state_dict()) == keys
    gm.load_state_dict(model.state_dict(), strict=True)
    assert forward_equal(model, gm, args, kwargs)
    reached = sum(layer.forward for layer in report.layers)
    assert reached >= 0.99 * product_flops(model, args, kwargs)
    assert any(layer.status == "rewritten" for layer in report.layers)
    if gradients:
        found = gradients_equal(model, 0.25, args, kwargs)
        assert found == "equal" or found.startswith(("not in float64", "not compared")), found
    return gm, report


@pytest.mark.parametrize("name", HF)
def test_transformers(name):
    check("transformers", name)


@pytest.mark.parametrize("name", SOME_TIMM)
def test_timm(name):
    check("timm", name, gradients=name == "convnext_atto")


@pytest.mark.parametrize("name", DETECTION)
def test_detection(name):
    check("torchvision", name, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TRANSFORMERS) - set(HF)))
def test_more_of_transformers(name):
    check("transformers", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TIMM) - set(SOME_TIMM)))
def test_more_of_timm(name):
    check("timm", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(names_of("torchvision")) - set(DETECTION)))
def test_all_of_torchvision(name):
    check("torchvision", name, gradients=False)


def test_a_tied_head_stays_dense_and_generate_works():
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    model, _, kwargs = LIBRARIES["transformers"]("GPT2LMHeadModel")
    gm, report = fxprop.transform(model, 0.25, example_kwargs=kwargs)
    assert {layer.name: layer.status for layer in report.layers}["lm_head"] == "dense"
    assert isinstance(gm, type(model))
    ids = kwargs["input_ids"][:, :3]
    expected = model.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(gm.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


def test_the_experts_of_a_mixture_are_sites():
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    model, _, kwargs = LIBRARIES["transformers"]("MixtralForCausalLM")
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        gm, report = fxprop.transform(model, 0.25, example_kwargs=kwargs)
        experts = [layer for layer in report.layers if "experts." in layer.name]
        assert {layer.op for layer in experts} == {{"eager": "linear"}.get(implementation, "grouped_mm")}
        assert {layer.status for layer in experts} == {"rewritten"}
        assert torch.equal(gm(**kwargs).loss, model(**kwargs).loss)
        gm(**kwargs).loss.backward()
    model.set_experts_implementation("eager")
    assert gradients_equal(model, 0.25, (), kwargs) == "equal"
