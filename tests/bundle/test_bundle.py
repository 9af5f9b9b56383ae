"""A bundle predicts the same wherever it is loaded, and refuses to load altered."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import bertray
from bertray import Bundle, BundleError, Prediction, RequestError
from bertray.bundle.bundle import seal
from bertray.bundle.card import model_card
from bertray.bundle.info import hash_files, read_info
from bertray.metrics.calibration import probabilities
from bertray.model.adapter import scale_logits
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA, PREDICTION_SCHEMA
from bertray.storage.location import Location
from bertray.tasks.multi_label import is_given

TEXTS = ["Python, SQL", "B.Sc. in Physics, 2014", "a long text " * 60, "jane@example.org", "東京 – Zürich"]


def test_the_hugging_face_pipeline_gives_the_same_labels_and_scores(tiny_bundle: Path) -> None:
    expected = pipeline("text-classification", model=str(tiny_bundle), truncation=True)(TEXTS)
    predictions = Bundle.load(str(tiny_bundle), "fp32").predict(TEXTS)
    assert len({prediction.label for prediction in predictions}) > 1
    for prediction, other in zip(predictions, expected, strict=True):
        assert prediction.label == other["label"]
        assert prediction.score == pytest.approx(other["score"], abs=1e-4)
    assert [prediction.truncated for prediction in predictions] == [False, False, True, False, False]
    assert predictions[2].num_tokens == 64


def test_threads_that_share_a_bundle_take_turns(tiny_bundle: Path) -> None:
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    columns = [[f"{thread} word{number} " * (number % 30 + 1) for number in range(200)] for thread in range(4)]
    expected = [bundle.predict(column) for column in columns]
    fresh = Bundle.load(str(tiny_bundle), "fp32")
    with ThreadPoolExecutor(len(columns)) as pool:
        for _ in range(3):
            found = list(pool.map(fresh.predict, columns))
            assert [[one.label for one in column] for column in found] == [
                [one.label for one in column] for column in expected
            ]


def test_rows_that_cannot_be_scored(tiny_bundle: Path) -> None:
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    alone = bundle.predict(["Python, SQL"])[0]
    predictions = bundle.predict([None, "Python, SQL", ""])
    assert predictions[0] == (None, None, True, 0, False, "text is null", *[None] * 4)
    assert predictions[1].label == alone.label
    assert predictions[1].score == pytest.approx(alone.score, abs=1e-6)
    assert predictions[2].error == "text is empty"
    assert bundle.predict([]) == []
    assert [prediction.error for prediction in bundle.predict([None])] == ["text is null"]


def test_columns_in_columns_out(tiny_bundle: Path) -> None:
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    table = bundle.predict_column(pa.array([*TEXTS, None]))
    assert table.schema.equals(PREDICTION_SCHEMA)
    assert [Prediction(**row) for row in table.to_pylist()] == bundle.predict([*TEXTS, None])
    assert bundle.predict_column(pa.array([], pa.string())).num_rows == 0


def test_what_is_to_be_reviewed(make_bundle: Callable[..., Path]) -> None:
    texts = [*TEXTS, None]
    plain = Bundle.load(str(make_bundle()), "fp32").predict(texts)
    assert [one.review for one in plain] == [one.error is not None for one in plain]  # without a label: always
    scores = sorted(one.score for one in plain if one.score is not None)
    strict = Bundle.load(str(make_bundle(review_below=scores[2])), "fp32").predict(texts)
    assert [one.review for one in strict] == [one.score is None or one.score < scores[2] for one in plain]
    assert sum(one.review for one in strict) == 3  # the limit itself is not below it, a row with an error is
    assert [one._replace(review=one.error is not None) for one in strict] == plain
    assert all(one.review for one in Bundle.load(str(make_bundle(review_below=2.0)), "fp32").predict(texts))


THRESHOLDS = (0.9, 0.2, 0.6)


@pytest.mark.parametrize("thresholds", [None, THRESHOLDS])
def test_several_labels_a_row(make_bundle: Callable[..., Path], thresholds: tuple[float, ...] | None) -> None:
    folder = make_bundle(problem_type="multi_label_classification", thresholds=thresholds)
    bundle = Bundle.load(str(folder), "fp32")
    texts = [None, *(words(number) for number in range(1, 60)), ""]
    table = bundle.predict_column(pa.array(texts))
    assert table.schema.equals(MULTI_LABEL_PREDICTION_SCHEMA)
    predictions = bundle.predict(texts)
    assert [Prediction(**row) for row in table.to_pylist()] == predictions
    _, logits_NC = bundle.logits(pa.array(texts))
    for prediction, logits_C in zip(predictions, logits_NC, strict=True):
        if prediction.error:
            assert (prediction.label, prediction.score, prediction.labels) == (None, None, None)
            continue
        sure = dict(zip("abc", torch.tensor(logits_C).sigmoid().tolist(), strict=True))
        reached = [label for label, least in zip("abc", thresholds or (0.5,) * 3, strict=True) if sure[label] >= least]
        assert prediction.labels == sorted(reached, key=lambda label: -sure[label])
        assert prediction.label == max(sure, key=lambda label: sure[label])
        assert prediction.score == pytest.approx(max(sure.values()), abs=1e-6)
    assert {len(one.labels) for one in predictions if one.labels is not None} > {1, 2}
    assert bundle.predict([None])[0].labels is None
    assert bundle.predict_column(pa.array([], pa.string())).num_rows == 0


def test_a_label_is_given_at_its_threshold() -> None:
    probabilities_NC = np.array([[0.3, 0.7], [0.5, 0.2]], dtype=np.float32)
    thresholds = probabilities_NC[0].astype(float).tolist()
    assert is_given(probabilities_NC, thresholds).tolist() == [[True, True], [True, False]]
    assert is_given(probabilities_NC, None).tolist() == [[False, True], [True, False]]


def test_a_temperature_in_the_weights_scales_what_every_tool_reads(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_bundle()
    _, logits_NC = Bundle.load(str(folder), "fp32").logits(pa.array(TEXTS))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert scale_logits(model, 4.0)
    shutil.copytree(folder, tmp_path / "scaled")
    model.save_pretrained(tmp_path / "scaled")
    expected_NC = probabilities(logits_NC / 4, "single_label_classification")
    found = pipeline("text-classification", model=str(tmp_path / "scaled"), truncation=True)(TEXTS)
    assert [one["score"] for one in found] == pytest.approx(expected_NC.max(axis=1).tolist(), abs=1e-4)
    assert [one["label"] for one in found] == ["abc"[best] for best in logits_NC.argmax(axis=1)]


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_gives_no_number_gives_no_label(
    problem_type: str, number: float, make_bundle: Callable[..., Path]
) -> None:
    bundle = Bundle.load(str(make_bundle(problem_type=problem_type)), "fp32")
    torch.nn.init.constant_(bundle.encoder.model.classifier.bias[:1], number)
    predictions = bundle.predict(["some text", None])
    assert [(one.label, one.score, one.labels, one.review) for one in predictions] == [(None, None, None, True)] * 2
    assert [one.error for one in predictions] == ["the model's output is not a number", "text is null"]


def test_predict_takes_strings_only(tiny_bundle: Path) -> None:
    bundle = Bundle.load(str(tiny_bundle))
    for texts in ([1, 2], ["lone surrogate \ud800"]):
        with pytest.raises(RequestError, match="give a sequence of strings"):
            bundle.predict(texts)  # type: ignore[arg-type]
    assert [one.error for one in bundle.predict(["a", float("nan")])] == [None, "text is null"]  # type: ignore[list-item]
    with pytest.raises(RequestError, match=r"not one string: \[text\]"):
        bundle.predict("a text")


def test_a_bundle_on_s3(tiny_bundle: Path, s3_folder: str) -> None:
    Location.of(s3_folder).put_folder(tiny_bundle, last="bundle.json")
    assert Bundle.load(s3_folder, "fp32").predict(TEXTS) == Bundle.load(str(tiny_bundle), "fp32").predict(TEXTS)


def words(num_words: int) -> str:
    """Text of different words: its windows have different logits."""
    return " ".join(["physics", "sql", "Zürich", "cook", "sales", "north", "wave"][n * n % 7] for n in range(num_words))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_long_documents_are_read_to_their_end(make_bundle: Callable[..., Path], how: str) -> None:
    folder = make_bundle(max_length=16, long_documents=how, stride=4)
    bundle = Bundle.load(str(folder), "fp32")
    texts = [words(3), words(14), words(50), None, words(15), words(400)]
    predictions = bundle.predict(texts)
    assert [one.truncated for one in predictions] == [False] * 6
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, prediction in zip(texts, predictions, strict=True):
        if text is None:
            assert prediction == (None, None, True, 0, False, "text is null", *[None] * 4)
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = [0]
        if len(ids) > 14:
            num_steps = -(-(len(ids) - 14) // 10)
            starts = [step * (len(ids) - 14) // num_steps for step in range(num_steps + 1)]
        windows = [[tokenizer.cls_token_id, *ids[at : at + 14], tokenizer.sep_token_id] for at in starts]
        with torch.inference_mode():
            logits = np.stack([model(input_ids=torch.tensor([one])).logits[0].numpy() for one in windows])
        logits_C = logits.mean(axis=0) if how == "mean" else logits.max(axis=0)
        probabilities = torch.tensor(logits_C).softmax(dim=0)
        assert prediction.label == bundle.info.labels[int(probabilities.argmax())]
        assert prediction.score == pytest.approx(float(probabilities.max()), abs=1e-4)
        assert prediction.num_tokens == sum(map(len, windows))


def test_texts_that_fit_do_not_depend_on_the_policy(make_bundle: Callable[..., Path]) -> None:
    texts = [words(number) for number in (1, 5, 14)]
    plain, mean, largest = (
        Bundle.load(str(make_bundle(max_length=16, **policy)), "fp32").predict(texts)
        for policy in ({}, {"long_documents": "mean", "stride": 4}, {"long_documents": "max", "stride": 4})
    )
    assert plain == mean == largest


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def test_an_altered_file_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {"0": "c", "1": "b", "2": "a"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"was altered: config\.json has sha256 .* bundle\.json says"):
        Bundle.load(str(copy))


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"is incomplete: model\.safetensors is missing"):
        Bundle.load(str(copy))


def test_an_added_file_is_refused(copy: Path) -> None:
    (copy / ".note").write_text("of another tool")
    Bundle.load(str(copy))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"was altered: adapter_config\.json does not belong to it"):
        Bundle.load(str(copy))


def test_the_card_may_be_edited(copy: Path) -> None:
    assert "3-way text classifier" in (copy / "README.md").read_text()
    (copy / "README.md").write_text("ours")
    Bundle.load(str(copy))


def test_how_training_went_is_no_part_of_what_is_hashed(copy: Path, tiny_bundle: Path, s3_folder: str) -> None:
    plain = read_info(Location.of(str(tiny_bundle)))
    assert "report.html" not in (copy / "README.md").read_text()
    assert "tensorboard" not in (copy / "README.md").read_text()
    (copy / "report.html").write_text("<h1>")
    (copy / "learning_curves.svg").write_text("<svg/>")  # of an earlier version
    (copy / "tensorboard" / "train").mkdir(parents=True)
    (copy / "tensorboard" / "train" / "events.out.tfevents.1.host").write_bytes(b"of now")
    Bundle.load(str(copy))  # not "altered"
    facts = plain.model_dump(exclude={"files", "versions"})
    assert "is kept: the best macro-F1 on validation." in (copy / "README.md").read_text()
    facts["training"]["keep"] = "last"
    info = seal(copy, **facts)
    assert info.files == plain.files
    assert info.fingerprint() == plain.fingerprint()
    card = (copy / "README.md").read_text()
    assert "is kept: the last one." in card
    assert "\n\nHow training went: [report.html](report.html).\n\n" in card
    assert "`tensorboard --logdir PATH OF THIS FOLDER/tensorboard` ([event file](tensorboard))" in card
    place = Location.of(s3_folder)
    place.put_folder(copy, last="bundle.json")
    assert "tensorboard/train/events.out.tfevents.1.host" in [file.path for file in place.files()]
    assert Bundle.load(s3_folder).info == info
    (copy / "tensorboard.json").write_text("")
    with pytest.raises(BundleError, match=r"was altered: tensorboard\.json does not belong to it"):
        Bundle.load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(format_version=2), "is of format 2; this version of bertray reads format 1"),
        (lambda info: info.pop("labels"), "cannot be read: .*labels"),
        (lambda info: info.update(long_documents="middle"), "cannot be read: long_documents: .*'truncate', 'mean'"),
        (lambda info: info.update(long_documents="mean"), "long_documents mean does not go with stride None"),
        (lambda info: info.update(thresholds=[0.5] * 3), "thresholds do not go with problem_type single_label"),
        (
            lambda info: info.update(problem_type="multi_label_classification", thresholds=[0.5]),
            "there are 1 thresholds for 3 labels",
        ),
        (lambda info: info["files"].update({"../x": "0"}), r"the file '\.\./x' lies outside of the bundle"),
        (lambda info: info.update(target_precision=0.9), r"target_precision 0\.9 does not go without review_below"),
        (lambda info: info.update(temperature=0), "temperature: Input should be greater than 0"),
        (lambda info: info.update(review_below=-0.1), "review_below: Input should be greater than or equal to 0"),
    ],
)
def test_a_bundle_json_that_does_not_fit_is_refused(copy: Path, change: object, message: str) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    change(info)  # type: ignore[operator]
    (copy / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(BundleError, match=message):
        Bundle.load(str(copy))


def test_a_folder_that_is_no_bundle_names_jobs_train(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no model bundle: it has no bundle\.json.*bertray train .* BUNDLE$"):
        Bundle.load(str(tmp_path))  # which is there: nothing is to be written to it
    with pytest.raises(BundleError, match=r"bertray train .*/nowhere$"):
        Bundle.load(str(tmp_path / "nowhere"))


def test_the_fingerprint_follows_what_predictions_depend_on(tiny_bundle: Path, copy: Path) -> None:
    original = read_info(Location.of(str(tiny_bundle)))
    assert read_info(Location.of(str(copy))).fingerprint() == original.fingerprint()
    assert original.model_copy(update={"max_length": 32}).fingerprint() != original.fingerprint()
    assert original.model_copy(update={"files": {}}).fingerprint() != original.fingerprint()
    policies = [{}, *({"long_documents": how, "stride": stride} for how in ("mean", "max") for stride in (8, 16))]
    assert len({original.model_copy(update=policy).fingerprint() for policy in policies}) == 5
    multi = {"problem_type": "multi_label_classification"}
    outputs = [{}, {"review_below": 0.5}, {"review_below": 0.6}, multi]
    outputs += [{**multi, "thresholds": thresholds} for thresholds in ((0.5, 0.5, 0.5), (0.5, 0.6, 0.5))]
    assert len({original.model_copy(update=output).fingerprint() for output in outputs}) == 6
    # For the record alone: what is in the weights is in the files.
    record = {"temperature": 1.7, "calibration": {"ece_after": 0.01}, "target_precision": 0.9, "oos_label": "oos"}
    assert original.model_copy(update=record).fingerprint() == original.fingerprint()


def test_a_bundle_of_before_there_were_windows_and_thresholds(copy: Path) -> None:
    before = read_info(Location.of(str(copy))).fingerprint()
    info = json.loads((copy / "bundle.json").read_text())
    for added in (
        "stride",
        "temperature",
        "calibration",
        "thresholds",
        "review_below",
        "target_precision",
        "oos_label",
    ):
        del info[added]
    (copy / "bundle.json").write_text(json.dumps(info))
    assert Bundle.load(str(copy)).info.fingerprint() == before
    # What such a version computed, so that archives are not scored anew.
    read = {"files": info["files"], "max_length": 64, "long_documents": "truncate"}
    assert before == hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def test_the_card_says_how_long_documents_are_read(make_bundle: Callable[..., Path]) -> None:
    assert "Texts are cut to 64 tokens." in (make_bundle() / "README.md").read_text()
    card = (make_bundle(long_documents="max", stride=8) / "README.md").read_text()
    assert "windows of 64 that overlap by 8 or more; a text's logits are the max of its windows'." in card
    assert "That pipeline reads the first 64 tokens" in card


def test_the_card_says_how_sure_it_is(make_bundle: Callable[..., Path]) -> None:
    plain = (make_bundle() / "README.md").read_text()
    for word in ("temperature", "reviewed", "several labels", "given from", "top_k"):
        assert word not in plain
    calibration = {"ece_before": 0.0712, "ece_after": 0.01, "nll_before": 0.5, "nll_after": 0.4, "nll_gain_z": 1.9}
    assert "temperature" not in (make_bundle(temperature=1.5, calibration=calibration) / "README.md").read_text()
    calibration["nll_gain_z"] = 2.0
    sure = make_bundle(temperature=1.5, calibration=calibration, review_below=0.61, target_precision=0.95)
    card = (sure / "README.md").read_text()
    assert "divided by a temperature of 1.500, in the weights" in card
    assert "was 0.5000 before and is 0.4000 now; " in card
    assert "was 0.0712 and is 0.0100." in card
    assert (
        "A text with a score below 0.6100 is to be reviewed by a person: of the others, 0.95 or more are right" in card
    )
    assert "reviewed by a person.\n" in (make_bundle(review_below=0.5) / "README.md").read_text()
    never = (make_bundle(review_below=2.0, target_precision=0.99) / "README.md").read_text()
    assert "Every text is to be reviewed by a person: no score is right often enough on validation for 0.99.\n" in never
    several = make_bundle(problem_type="multi_label_classification", thresholds=THRESHOLDS)
    card = (several / "README.md").read_text()
    assert "at least the threshold of the label.\n" in card
    assert (
        "| label | given from |\n|---|---|\n| `a` | 0.9000 |\n| `b` | 0.2000 |\n| `c` | 0.6000 |\n\n| validation"
        in card
    )
    assert 'truncation=True, top_k=None)("a text")' in card


def test_labels_in_the_card_are_no_markup(make_bundle: Callable[..., Path]) -> None:
    folder = make_bundle(problem_type="multi_label_classification", thresholds=THRESHOLDS)
    info = read_info(Location.of(str(folder)))
    hostile = ("<script>alert(1)</script>", "a|b `c``d`", "two\nlines \x1b[31m")
    changed = {"labels": hostile, "training": {**info.training, "data": "a`<b>`"}}
    card = model_card(info.model_copy(update=changed), folder)
    assert "Labels: `<script>alert(1)</script>`, ``` a|b `c``d` ```, `two lines \\x1b[31m`\n" in card
    assert "\n| ``` a\\|b `c``d` ``` | 0.2000 |\n" in card
    assert "`` a`<b>` ``" in card


@pytest.mark.parametrize("policy", [{}, {"long_documents": "mean", "stride": 4}])
def test_a_text_with_a_token_that_has_no_embedding_gets_an_error(
    policy: dict[str, object], make_bundle: Callable[..., Path]
) -> None:
    """Bundles of earlier versions may have such tokenizers."""
    folder = make_bundle(max_length=16, **policy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a text", "see [URL] here", None, "", f"{words(13)} [URL]", f"{words(14)} [URL]", words(30)]
    expected = Bundle.load(str(folder), "fp32").predict(texts)
    tokenizer.add_tokens(["[URL]"])
    assert tokenizer.convert_tokens_to_ids("[URL]") == 30522
    tokenizer.save_pretrained(folder)
    sealed_again(folder)
    found = Bundle.load(str(folder), "fp32").predict(texts)
    wrong = {1, 4, 5} if policy else {1, 4}  # what is cut off is not read
    for row, (one, before) in enumerate(zip(found, expected, strict=True)):
        if row in wrong:
            assert (one.label, one.num_tokens) == (None, 0)
            assert one.error == "text has a token that the model has no embedding for"
        else:
            assert (one.label, one.num_tokens, one.error) == (before.label, before.num_tokens, before.error)


def test_a_bundle_that_needs_code_of_its_own_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    sealed_again(copy)
    with pytest.raises(BundleError, match="cannot be loaded"):
        Bundle.load(str(copy))


def sealed_again(folder: Path) -> None:
    info = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(info | {"files": hash_files(folder)}))


def test_nothing_in_a_bundle_is_pickled(tiny_bundle: Path) -> None:
    assert {path.suffix for path in tiny_bundle.iterdir()} <= {".json", ".safetensors", ".md", ".txt"}


def test_the_public_names() -> None:
    for name in bertray.__all__:
        assert getattr(bertray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bertray.nothing  # noqa: B018
