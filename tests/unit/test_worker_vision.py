"""Models that see, tiny ones of each family: what mlx-vlm says of an image, in a batch, beside texts, and again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxd.childwire import CountTokens, Generate, Generated
from mlxd.worker import load as loading
from mlxd.worker.engine import Engine
from mlxd.worker.faults import EngineLost
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.running import Outcome
from mlxd.worker.sights import NOT_WITH_IMAGES, check_options
from mlxd.worker.vision import FAMILIES, FeatureCache
from mlxd_client.errors import ContextExceeded, InternalError, InvalidParams, ModelInvalid, RpcError, Unsupported
from support import tiny_model, tiny_vision

mlx_vlm = pytest.importorskip("mlx_vlm")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 12}
BUDGET = 16 * 1024 * 1024


def picture(seed: int, size: tuple[int, int] = (90, 70)) -> bytes:
    """Nine fields of different shades."""
    shades = bytes((97 * (seed + 3) * (place + 1) ** 2) % 256 for place in range(27))
    file = io.BytesIO()
    Image.frombytes("RGB", (3, 3), shades).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


CAT, DOG, TALL = picture(0), picture(1), picture(2, (40, 120))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: tiny_vision.build(home / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {family: load(str(folder), lambda fraction: None) for family, folder in folders.items()}


@pytest.fixture(params=["qwen2_vl", "smolvlm"])  # positions of three dimensions, and of one
def engine(request: pytest.FixtureRequest, models: dict[str, LoadedModel]) -> Engine:
    return make(models[request.param])


def make(loaded: LoadedModel, **limits: Any) -> Engine:
    assert loaded.vision is not None
    loaded.vision.features = FeatureCache(0)
    return Engine(loaded, **({"max_batch": 8, "prefill_step": 16, "cache_bytes": BUDGET} | limits))


def turn(*parts: str | bytes) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "data": part}
            for part in parts
        ],
    }


def ask(*parts: str | bytes, **options: Any) -> Generate:
    return Generate(kind="chat", messages=[turn(*parts)], options=GREEDY | options, stream=True)


def drain(engine: Engine, ends: dict[int, Any] | None = None) -> dict[int, Any]:
    ends = {} if ends is None else ends
    while engine.busy:
        ends.update(engine.step().ended)
    return ends


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    end = drain(engine)[0]
    if isinstance(end, Exception):
        raise end
    return end  # type: ignore[no-any-return]


def reference(folder: Path, loaded: LoadedModel, *parts: str | bytes) -> str:
    """What mlx-vlm says on its own, greedily."""
    model, processor = mlx_vlm.load(str(folder), trust_remote_code=False)
    content = [{"type": "image"} if isinstance(part, bytes) else {"type": "text", "text": part} for part in parts]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(part)) for part in parts if isinstance(part, bytes)]
    made = mlx_vlm.stream_generate(model, processor, text, image=images or None, max_tokens=12, temperature=0.0)
    detokenizer = loaded.tokenizer.detokenizer
    detokenizer.reset()
    for part in list(made)[:12]:  # its last piece comes twice
        if part.token not in loaded.tokenizer.eos_token_ids:
            detokenizer.add_token(part.token)
    detokenizer.finalize()
    return detokenizer.text  # type: ignore[no-any-return]


# --- what is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_mlx_vlm_says(family: str, folders: dict[str, Path], models: dict[str, LoadedModel]) -> None:
    loaded = models[family]
    assert "vision" in loaded.capabilities
    engine = make(loaded)
    answers = []
    for parts in (("look ", CAT, " what is it"), ("look ", DOG, " what is it"), (CAT, " or ", TALL, "?"), ("hello",)):
        answers.append(alone(engine, ask(*parts)).text)
        assert answers[-1] == reference(folders[family], loaded, *parts)
    assert answers[0] != answers[1]  # of another image


def test_a_quantised_model_sees(tmp_path: Path) -> None:
    folder = tiny_vision.build(tmp_path, "qwen2_5_vl", quantize=4)
    loaded = load(str(folder), lambda fraction: None)
    parts = ("look ", CAT, " what is it")
    assert alone(make(loaded), ask(*parts)).text == reference(folder, loaded, *parts)


def test_texts_and_images_at_the_same_time(engine: Engine) -> None:
    requests = [
        ask("hello", max_tokens=30),
        ask(CAT, "what is it", max_tokens=20),
        ask("the quick brown fox", max_tokens=25),
        ask("these ", CAT, TALL, max_tokens=15),
        ask(DOG, "what is it", max_tokens=9),
    ]
    wanted = [alone(make(engine._loaded), request).text for request in requests]
    ends: dict[int, Any] = {}
    for number, request in enumerate(requests):
        engine.submit(number, request)
        for _ in range(2 * number):  # they join at different depths of each other
            ends.update(engine.step().ended)
    drain(engine, ends)
    assert [ends[number].text for number in range(len(requests))] == wanted


def test_the_next_turn_and_another_question(engine: Engine) -> None:
    """What was computed of an image, and of the tokens before it, is not computed again; and it changes nothing."""
    first = alone(engine, ask(CAT, "what is it"))
    assert first.cached_tokens == 0
    conversation = Generate(
        kind="chat",
        messages=[turn(CAT, "what is it"), {"role": "assistant", "content": first.text}, turn("and where")],
        options=GREEDY,
    )
    other = ask(CAT, "is it a fox")
    for request in (conversation, other):
        fresh = alone(make(engine._loaded), request)
        vision = engine._loaded.vision
        assert vision is not None
        again = make(engine._loaded)
        alone(again, ask(CAT, "what is it"))
        looked = vision.features.misses
        end = alone(again, request)
        assert (end.text, end.prompt_tokens) == (fresh.text, fresh.prompt_tokens)
        assert end.cached_tokens > 4
        assert vision.features.misses == looked


def test_an_image_is_looked_at_once(engine: Engine, tmp_path: Path) -> None:
    vision = engine._loaded.vision
    assert vision is not None
    (tmp_path / "cat.png").write_bytes(CAT)
    by_bytes = alone(engine, ask("look ", CAT))
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "Look here: "}, {"type": "image", "path": str(tmp_path / "cat.png")}],
    }
    alone(engine, Generate(kind="chat", messages=[message], options=GREEDY))
    assert (vision.features.hits, vision.features.misses) == (1, 1)
    message["content"][0]["text"] = "look "  # type: ignore[index]
    by_path = alone(engine, Generate(kind="chat", messages=[message], options=GREEDY))
    assert by_path.text == by_bytes.text
    assert by_path.cached_tokens > 0
    alone(engine, ask("these ", CAT, DOG))
    assert (vision.features.hits, vision.features.misses) == (2, 2)


def test_another_image_is_never_taken_for_this_one(engine: Engine) -> None:
    """The tokens are the same: only the images differ, or their order."""
    answers = [alone(engine, ask(*images, "what")).text for images in ((CAT,), (DOG,), (CAT, DOG), (DOG, CAT))]
    fresh = [
        alone(make(engine._loaded), ask(*images, "what")).text for images in ((CAT,), (DOG,), (CAT, DOG), (DOG, CAT))
    ]
    assert answers == fresh
    assert len(set(answers)) > 2


def test_cache_prompt_false_neither_reads_nor_keeps(engine: Engine) -> None:
    vision = engine._loaded.vision
    assert vision is not None
    for _ in range(2):
        assert alone(engine, ask(CAT, "what", cache_prompt=False)).cached_tokens == 0
    assert len(vision.features) == vision.features.hits == 0
    assert engine.cache is not None
    assert engine.cache.nbytes == 0


def test_without_a_prompt_cache(engine: Engine) -> None:
    wanted = alone(engine, ask(CAT, "what")).text
    bare = make(engine._loaded, cache_bytes=0)
    assert [alone(bare, ask(CAT, "what")).text for _ in range(2)] == [wanted, wanted]


def test_a_small_budget_holds(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen2_vl"], cache_bytes=40_000)
    vision = models["qwen2_vl"].vision
    assert vision is not None
    assert engine.cache is not None
    for seed in range(6):
        alone(engine, ask(picture(seed, (60 + seed, 60)), "what"))
        assert vision.features.nbytes <= 5_000
        assert vision.features.nbytes + engine.cache.nbytes <= 40_000
    assert vision.features.misses == 6


def test_where_memory_is_short_one_waits_for_the_other(engine: Engine) -> None:
    requests = [ask(CAT, "what is it", max_tokens=9), ask("these ", CAT, TALL), ask("hello"), ask(DOG), ask(TALL, "?")]
    wanted = [alone(make(engine._loaded), request).text for request in requests]
    tight = make(engine._loaded, kv_bytes=250_000)  # for one of them
    for number, request in enumerate(requests):
        tight.submit(number, request)
    ends: dict[int, Any] = {}
    most = 0
    while tight.busy:
        ends.update(tight.step().ended)
        most = max(most, tight.active)
    assert most == 1
    assert [ends[number].text for number in range(len(requests))] == wanted


def test_a_default_of_quantised_caches_leaves_images_alone(engine: Engine) -> None:
    wanted = alone(engine, ask(CAT, "what is it")).text
    assert alone(make(engine._loaded, kv_bits=8), ask(CAT, "what is it")).text == wanted


def test_texts_are_guessed_ahead_and_images_are_not(models: dict[str, LoadedModel]) -> None:
    loaded = models["smolvlm"]
    wanted = alone(make(loaded), ask("hello hello hello", max_tokens=40)).text
    guessed = alone(make(loaded), ask("hello hello hello", max_tokens=40, speculation="lookup"))
    assert guessed.text == wanted
    assert alone(make(loaded), ask(CAT, "hello", max_tokens=40, speculation="auto")).speculation is None


def test_features_used_longest_ago_go_first() -> None:
    cache = FeatureCache(100)
    for name in (b"a", b"b", b"c"):
        cache.keep(name, (mx.zeros((10,), mx.float32),))
        cache.find(b"a")
    assert [cache.find(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.nbytes == 80
    cache.keep(b"large", (mx.zeros((26,), mx.float32),))
    assert len(cache) == 2


def test_an_answer_about_an_image_follows_a_schema(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"fox": {"type": "boolean"}},
        "required": ["fox"],
        "additionalProperties": False,
    }
    end = alone(engine, ask(CAT, "is it a fox", schema=schema, max_tokens=60))
    assert end.structured in ({"fox": True}, {"fox": False})


# --- ends -----------------------------------------------------------------------------------------------------------


def test_cancelled_at_any_time(engine: Engine) -> None:
    wanted = alone(engine, ask("hello")).text
    for steps in range(8):
        engine = make(engine._loaded)
        engine.submit(1, ask("hello"))
        engine.submit(2, ask("these ", CAT, TALL, max_tokens=50))
        ends: dict[int, Any] = {}
        for _ in range(steps):
            ends.update(engine.step().ended)
        ends.update(engine.cancel(2).ended)
        drain(engine, ends)
        assert ends[2].finish_reason == "cancelled"
        assert ends[1].text == wanted


def test_what_fails_on_an_image_costs_nobody_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(engine, ask("hello")).text

    def fail(inputs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(engine._loaded.vision, "_see", fail)
    engine.submit(1, ask("hello"))
    engine.submit(2, ask(DOG))
    ends = drain(engine)
    assert isinstance(ends[2], InternalError)
    assert ends[1].text == wanted


def test_a_lost_device_ends_the_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: Any) -> Any:
        raise RuntimeError("[METAL] Command buffer execution failed")

    monkeypatch.setattr(engine._loaded.vision, "_see", fail)
    engine.submit(1, ask(DOG))
    with pytest.raises(EngineLost):
        drain(engine)


def test_what_a_request_quotes_is_no_lost_device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_more: Any) -> Any:
        raise InvalidParams("the model's chat template refuses: there is no [METAL] here", field="messages")

    monkeypatch.setattr(engine._prompts, "build", refuse)
    engine.submit(1, ask(DOG))
    assert isinstance(drain(engine)[1], InvalidParams)


def test_a_bad_image_costs_nobody_else(engine: Engine) -> None:
    engine.submit(1, ask("hello"))
    engine.submit(2, ask(CAT, CAT[:50]))
    engine.submit(3, ask(CAT))
    ends = drain(engine)
    assert isinstance(ends[2], InvalidParams)
    assert ends[2].details["field"] == "messages[0].content[1]"
    assert isinstance(ends[1], Generated)
    assert isinstance(ends[3], Generated)


def test_an_odd_shape_is_refused_or_seen(engine: Engine) -> None:
    for size in ((1, 1), (1, 3000), (3000, 1)):
        engine.submit(1, ask(picture(0, size), "what"))
        end = drain(engine)[1]
        assert isinstance(end, Generated | InvalidParams), end


def test_the_models_own_marks_in_a_text(models: dict[str, LoadedModel]) -> None:
    for family, marks in (
        ("qwen2_vl", ["<|image_pad|>", "<|vision_start|><|video_pad|>"]),
        ("gemma3", ["<start_of_image>", "<image_soft_token>"]),
    ):
        for mark in marks:
            with pytest.raises(InvalidParams) as refused:
                alone(make(models[family]), ask(CAT, f"what is {mark} this"))
            assert refused.value.details["field"] == "messages"


def test_a_prompt_that_is_too_long_with_its_images(models: dict[str, LoadedModel]) -> None:
    with pytest.raises(ContextExceeded):
        alone(make(models["smolvlm"]), ask(*[CAT] * 16, "what is it" * 30))


@pytest.mark.parametrize("name", NOT_WITH_IMAGES)
def test_an_option_that_images_cannot_have_is_refused(name: str) -> None:
    for value in NOT_WITH_IMAGES[name]:
        check_options(ask(CAT, **{name: value}))
    check_options(ask(CAT))
    with pytest.raises(Unsupported) as refused:
        check_options(ask(CAT, **{name: "draft"}))
    assert refused.value.details["option"] == name


def test_a_request_that_cannot_be_honoured_leaves_nothing(engine: Engine) -> None:
    for options in ({"n": 2}, {"temperature": -1}, {"schema": False}):
        with pytest.raises(RpcError):
            engine.submit(1, ask(CAT, **options))
        assert not engine.busy


def test_images_with_an_adapter_are_refused(engine: Engine) -> None:
    request = ask("what is this? ", picture(1))
    request.adapter = "/no/such/adapter"
    with pytest.raises(Unsupported) as refused:
        engine.submit(1, request)
    assert refused.value.details["option"] == "adapter"
    assert not engine.busy


def test_tokens_of_images_are_not_counted(engine: Engine) -> None:
    with pytest.raises(Unsupported):
        engine.count(CountTokens(messages=[turn("what", CAT)]))
    assert engine.count(CountTokens(messages=[turn("what")])) == engine.count(
        CountTokens(messages=[{"role": "user", "content": "what"}])
    )


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_model_of_text_sees_nothing(tmp_path: Path) -> None:
    engine = Engine(load(str(tiny_model.build(tmp_path)), lambda fraction: None), max_batch=2, prefill_step=16)
    with pytest.raises(Unsupported) as refused:
        engine.submit(1, ask(CAT))
    assert refused.value.details["option"] == "messages"


def test_without_the_extra_it_is_a_model_of_text(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "installed", lambda: False)
    with pytest.raises(ModelInvalid, match="extra `vision`"):  # mlx_lm has no such family
        load(str(folders["smolvlm"]), lambda fraction: None)
    loaded = load(str(folders["gemma3"]), lambda fraction: None)
    engine = Engine(loaded, max_batch=2, prefill_step=16)
    assert alone(engine, ask("hello")).finish_reason in ("stop", "length")
    with pytest.raises(Unsupported, match="extra `vision`"):
        engine.submit(1, ask(CAT))


def test_without_a_place_in_its_template_it_is_a_model_of_text(tmp_path: Path) -> None:
    folder = tiny_vision.build(tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": tiny_model.CHAT_TEMPLATE}))
    loaded = load(str(folder), lambda fraction: None)
    assert "vision" not in loaded.capabilities
    engine = Engine(loaded, max_batch=2, prefill_step=16)
    with pytest.raises(Unsupported, match="template"):
        engine.submit(1, ask(CAT))
    assert isinstance(alone(engine, ask("hello")), Generated)


def test_a_template_that_lies_with_the_processor(tmp_path: Path) -> None:
    folder = tiny_vision.build(tmp_path)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": settings.pop("chat_template")}))
    file.write_text(json.dumps(settings))
    assert {"chat", "vision"} <= set(load(str(folder), lambda fraction: None).capabilities)


def test_nothing_is_done_at_a_folders_word(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w')"
    for name, config, files in (
        ("code", {"model_file": "evil.py"}, {"evil.py": evil}),
        ("offload", {}, {"offload_index.json": "{}"}),
        ("weights", {}, {"other.safetensors": "not checked"}),
        ("away", {"text_config": {"ple_storage": {"manifest": "/etc/passwd"}}}, {}),
    ):
        folder = tiny_vision.build(tmp_path / name, config=config)
        for file, text in files.items():
            (folder / file).write_text(text)
        with pytest.raises(ModelInvalid):
            load(str(folder), lambda fraction: None)
    auto = {"AutoProcessor": "evil.Processor", "AutoImageProcessor": "evil.Images", "AutoTokenizer": "evil.Tokens"}
    folder = tiny_vision.build(tmp_path / "auto", "smolvlm", config={"auto_map": auto})
    (folder / "evil.py").write_text(evil)
    for name in ("preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"auto_map": auto}))
    try:
        load(str(folder), lambda fraction: None)
    except ModelInvalid:
        pass
    assert not ran.exists()


@pytest.mark.parametrize("name", ["depth", "embed_dim", "hidden_size", "image_size"])
def test_a_tower_without_measure_is_refused_before_it_is_built(name: str, tmp_path: Path) -> None:
    folder = tiny_vision.build(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][name] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelInvalid, match=name):
        load(str(folder), lambda fraction: None)


def test_a_converted_model_without_its_tower_is_mlx_lms(tmp_path: Path) -> None:
    """Converters for text leave the weights of the tower out, and the config as it was."""
    folder = tiny_vision.build(tmp_path, "gemma3")
    weights = mx.load(str(folder / "model.safetensors"))
    kept = {name: array for name, array in weights.items() if name.startswith("language_model")}  # type: ignore[union-attr]
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})
    loaded = load(str(folder), lambda fraction: None)
    assert loaded.vision is None
    assert Outcome() == Engine(loaded, max_batch=1, prefill_step=16).cancel(1)
