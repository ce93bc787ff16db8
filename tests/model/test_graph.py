"""The bookkeeping of the tower's CUDA graphs: what is captured, when, what drops it; who replays it."""

import copy
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from llava_fast.backend import use_backend
from llava_fast.chat import Turn, load, prepare, stream
from llava_fast.model import graph as vision_graph
from llava_fast.model import llava
from llava_fast.model.graph import SHAPES, State, VisionGraphs, capturable, wanted


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> VisionGraphs:
    """Graphs that are recorded on a CPU: a replay computes what the function did when it was captured."""
    monkeypatch.setattr(
        vision_graph,
        "wanted",
        lambda pixels, modules: not torch.is_grad_enabled() and not any(module.training for module in modules),
    )

    def capture(function, pixels):
        given = pixels.clone()
        graph.captured.append(tuple(pixels.shape))

        def replay(pixels):
            given.copy_(pixels)
            graph.replayed += 1
            return tree_map(torch.clone, function(given))

        return replay

    graph = VisionGraphs(capture)
    graph.captured, graph.replayed = [], 0
    return graph


@pytest.fixture
def watched(tiny: SimpleNamespace, graphs: VisionGraphs) -> SimpleNamespace:
    """A model with these graphs, and one with the same weights and none."""
    model = tiny.ours(tiny.config())
    plain = copy.deepcopy(model)
    plain.model._vision_graphs = without_graphs
    model.model._vision_graphs = graphs
    return SimpleNamespace(model=model, plain=plain, graphs=graphs)


def without_graphs(function, pixels, modules, *settings):
    return function(pixels, *settings)


def run(graphs: VisionGraphs, module: nn.Module, x: torch.Tensor, *settings: float) -> torch.Tensor:
    """Through the graphs without gradients; checked to be what the module computes."""

    def function(x: torch.Tensor, *settings: float) -> tuple[torch.Tensor, ...]:
        return module(x) * sum(settings, 1.0), x

    with torch.no_grad():
        result, same = graphs(function, x, [module], *settings)
        assert torch.equal(result, function(x, *settings)[0])
    assert torch.equal(same, x)
    return result


def test_a_shape_is_captured_when_it_comes_first(graphs: VisionGraphs) -> None:
    layer = nn.Linear(3, 2).eval()
    for i in range(3):
        run(graphs, layer, torch.randn(5, 3))
        assert (graphs.captured, graphs.replayed) == ([(5, 3)], i + 1)
    run(graphs, layer, torch.randn(6, 3))
    run(graphs, layer, torch.randn(5, 3), 2.0)
    with use_backend("reference", "layer_norm"):
        run(graphs, layer, torch.randn(5, 3))
    assert graphs.captured == [(5, 3), (6, 3), (5, 3), (5, 3)]
    assert len(graphs) == 4


def test_few_shapes_are_kept(graphs: VisionGraphs) -> None:
    layer = nn.Linear(3, 2).eval()
    for rows in (*range(1, SHAPES + 1), 1, SHAPES + 1):
        run(graphs, layer, torch.randn(rows, 3))
    assert len(graphs) == SHAPES
    assert graphs.captured == [(rows, 3) for rows in range(1, SHAPES + 2)]
    run(graphs, layer, torch.randn(1, 3))  # was used last but one
    assert len(graphs.captured) == SHAPES + 1
    run(graphs, layer, torch.randn(2, 3))  # is gone
    assert graphs.captured[SHAPES + 1 :] == [(2, 3)]


def test_a_changed_model_is_captured_anew_or_not_at_all(graphs: VisionGraphs) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False)).eval()
    x = torch.randn(5, 3)

    def twice() -> tuple[int, int]:
        """Captures and replays of two calls."""
        before = len(graphs.captured), graphs.replayed
        for _ in range(2):
            run(graphs, model, x)
        return len(graphs.captured) - before[0], graphs.replayed - before[1]

    assert twice() == (1, 2)
    with torch.no_grad():
        model[0].weight.mul_(2)  # in place: the graph reads it
    assert twice() == (0, 2)
    model[0].weight.data = model[0].weight.data.clone()
    assert twice() == (1, 2)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    assert twice() == (1, 2)
    model[1].bias = nn.Parameter(torch.ones(2))
    assert twice() == (1, 2)
    model[1] = nn.Linear(3, 2)
    assert twice() == (1, 2)
    model.append(nn.Linear(2, 2))
    assert twice() == (1, 2)
    hook = model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert twice() == (0, 0)
    hook.remove()
    assert twice() == (1, 2)
    model[0].forward = lambda x: x + 1
    assert twice() == (0, 0)
    del model[0].forward
    assert twice() == (1, 2)
    other = nn.Sequential(nn.Linear(3, 2)).eval()
    run(graphs, other, x)
    assert len(graphs) == 1


def test_training_frees_the_graphs(watched: SimpleNamespace, tiny: SimpleNamespace) -> None:
    batch = tiny.batch(watched.model.config, [[3, "image", 4]])
    with torch.no_grad():
        watched.model(**batch)
    assert len(watched.graphs) == 1
    watched.model(**batch)  # with gradients, but in evaluation mode
    assert len(watched.graphs) == 1
    watched.model.train()
    assert len(watched.graphs) == 0
    with torch.no_grad():
        watched.model(**batch)
    assert watched.graphs.captured == [(1, 3, 12, 12)]


def test_what_cannot_be_captured_runs_as_it_is(graphs: VisionGraphs, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def refuse(function, pixels):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    layer, x = nn.Linear(3, 2).eval(), torch.randn(5, 3)
    graphs._capture = refuse
    for _ in range(3):
        run(graphs, layer, x)
    assert len(tried) == 1
    assert [r.message for r in caplog.records] == [
        "the vision tower runs without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_wrong_images_are_no_reason_to_do_without(watched: SimpleNamespace) -> None:
    watched.graphs._capture = lambda function, pixels: function(pixels)
    with torch.no_grad(), pytest.raises(ValueError, match="pixel_values are 9×9"):
        watched.model.get_image_features(torch.zeros(1, 9, 9, 3, dtype=torch.uint8))
    assert len(watched.graphs) == 0


def test_threads_share_one_capture(graphs: VisionGraphs) -> None:
    layer = nn.Linear(3, 2).eval()
    threads = [threading.Thread(target=lambda: run(graphs, layer, torch.randn(5, 3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (graphs.captured, graphs.replayed) == ([(5, 3)], 8)


def test_copies_of_a_model_have_graphs_of_their_own(graphs: VisionGraphs) -> None:
    run(graphs, nn.Linear(3, 2).eval(), torch.randn(5, 3))
    assert (len(graphs), len(copy.deepcopy(graphs)), len(pickle.loads(pickle.dumps(VisionGraphs())))) == (1, 0, 0)


def test_which_modules_are_capturable(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).model
    assert all(capturable(module) for module in (*model.vision_tower.modules(), *model.multi_modal_projector.modules()))

    class Wrapped(nn.Linear):
        pass

    assert not capturable(Wrapped(2, 2))


def test_comparing_a_deep_model_takes_no_more_calls(tiny: SimpleNamespace) -> None:
    """Every call compares, so no Python function is called per module: only those that are implemented in C."""

    def calls(layers: int) -> int:
        model = tiny.ours(tiny.config(vision={"num_hidden_layers": layers})).model
        roots = [model.vision_tower, model.multi_modal_projector]
        state, names = State(roots), []
        sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
        try:
            assert state.unchanged(roots)
        finally:
            sys.setprofile(None)
        return len(names)

    assert calls(2) == calls(6) <= 6


def test_when_a_graph_is_wanted(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = tiny.ours(tiny.config())

    def asked(images: int = 1, cuda: bool = True) -> bool:
        return wanted(SimpleNamespace(is_cuda=cuda, shape=(images, 12, 12, 3)), [model])

    assert not asked()  # gradients
    with torch.no_grad():
        assert [asked(images) for images in (0, 1, 8, 9)] == [False, True, True, False]
        assert not asked(cuda=False)
        with FlopCounterMode(display=False):  # it would see no operator of a replay
            assert not asked()
        assert asked()
        model.train()
        assert not asked()


# Who replays


def test_settings_of_the_features_are_found_once(watched: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the key of the graph, and arguments of what it captures."""
    asked = []
    for name in ("pixel_normalisation", "feature_layers"):
        real = getattr(llava, name)
        monkeypatch.setattr(llava, name, lambda *a, name=name, real=real: asked.append(name) or real(*a))
    with torch.no_grad():
        watched.model.get_image_features(torch.zeros(1, 12, 12, 3, dtype=torch.uint8))
    assert sorted(asked) == ["feature_layers", "pixel_normalisation"]


def test_the_model_replays_what_it_computed(watched: SimpleNamespace, tiny: SimpleNamespace) -> None:
    """Through the whole model, whose features must not change when the next call overwrites the graph's buffers."""
    with torch.no_grad():
        inputs = [tiny.batch(watched.model.config, [[3, "image", 4]], seed=seed) for seed in range(3)]
        found = [watched.model(**one).image_hidden_states for one in inputs]
        for one, rows in zip(inputs, found, strict=True):
            tiny.assert_near(rows, watched.plain(**one).image_hidden_states)
    assert (len(watched.graphs.captured), watched.graphs.replayed) == (1, 3)


@pytest.mark.parametrize("layer", [None, -1, [1, -2]], ids=str)
def test_features_asked_for_are_replayed(watched: SimpleNamespace, tiny: SimpleNamespace, layer: list | None) -> None:
    """`get_image_features` replays, too, and returns what it does without a graph."""
    pixels = tiny.batch(watched.model.config, [["image"], ["image"]])["pixel_values"]
    if isinstance(layer, list):
        watched.model, watched.plain = (tiny.ours(tiny.config(vision_feature_layer=layer)) for _ in range(2))
        watched.model.model._vision_graphs = watched.graphs
    expected = watched.plain.get_image_features(pixels, layer)
    with torch.no_grad():
        first, found = (watched.model.get_image_features(pixels, layer) for _ in range(2))
        watched.model.get_image_features(torch.zeros_like(pixels), layer)
    for one in (first, found):
        assert torch.equal(torch.stack(one.pooler_output), torch.stack(expected.pooler_output))
        assert torch.equal(one.last_hidden_state, expected.last_hidden_state)
        assert [x is None for x in one.hidden_states] == [x is None for x in expected.hidden_states]
        for ours, theirs in zip(one.hidden_states, expected.hidden_states, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    assert (len(watched.graphs.captured), watched.graphs.replayed) == (1, 3)
    with torch.no_grad():  # more than a graph returns
        everything = watched.model.get_image_features(pixels, layer, output_hidden_states=True, output_attentions=True)
    assert len(everything.attentions) == 3
    assert not any(state is None for state in everything.hidden_states)
    assert watched.graphs.replayed == 3


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate_replays(watched: SimpleNamespace, tiny: SimpleNamespace, changes: dict) -> None:
    sequences = []
    for seed in range(3):
        batch = tiny.batch(watched.model.config, [[3, "image", 4], ["image", 2]], "left", seed)
        inputs = tiny.prompt(batch)
        settings = tiny.greedy(max_new_tokens=4, **changes)
        found, expected = (m.generate(**inputs, generation_config=settings) for m in (watched.model, watched.plain))
        assert torch.equal(found.sequences, expected.sequences)
        sequences.append(found.sequences)
        assert (len(watched.graphs.captured), watched.graphs.replayed) == (1, seed + 1)
    with torch.no_grad():  # a pass without `generate` replays the same graph
        watched.model(**batch)
    assert (len(watched.graphs.captured), watched.graphs.replayed) == (1, 4)


def test_the_graph_of_a_first_question_is_there_before_it(tiny_checkpoint: Path, graphs: VisionGraphs) -> None:
    model, processor = load(tiny_checkpoint, device="cpu")
    model.model._vision_graphs = graphs
    prepare(model)
    assert len(graphs.captured) == 1
    question = Turn("What is it?", (Image.linear_gradient("L").convert("RGB"),))
    list(stream(model, processor, [question], do_sample=False, max_new_tokens=2))
    assert (len(graphs.captured), graphs.replayed) == (1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_real_graph_gives_the_same_bits(tiny: SimpleNamespace, inference_mode: bool) -> None:
    model = tiny.ours(tiny.config()).cuda().eval()
    plain = copy.deepcopy(model)
    plain.model._vision_graphs = without_graphs
    with torch.inference_mode() if inference_mode else torch.no_grad():
        inputs = [tiny.batch(model.config, [[3, "image", 4]], seed=seed) for seed in range(4)]
        inputs = [{name: value.cuda() for name, value in one.items()} for one in inputs]
        found = [model(**one) for one in inputs]
        for one, outputs in zip(inputs, found):
            assert torch.equal(outputs.image_hidden_states, plain(**one).image_hidden_states)
    (replay,) = model.model._vision_graphs.replays.values()
    assert replay.__qualname__ == "capture_graph.<locals>.replay"


@pytest.mark.gpu
def test_a_loaded_model_has_its_graph(tiny_checkpoint: Path) -> None:
    model, _ = load(tiny_checkpoint, device="cuda")
    assert len(model.model._vision_graphs) == 1
