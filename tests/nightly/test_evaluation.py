"""MLflow's own evaluation of two settings of one model, and the gate on what it gives.

Run: python -m helpers test tests/nightly/test_evaluation.py
"""

import mlflow
from mlflow.entities import Feedback
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import scorer
from support.chat import load_chat

from helpers.operations.evaluation import meets, read_prompts
from helpers.paths import DATA
from helpers.release import count_met, gate

PROMPTS = read_prompts(DATA / "prompts.jsonl")


def test_mlflow_s_evaluate_gives_the_rows_that_the_gate_reads(tiny, store, tmp_path, monkeypatch):
    # Two settings of one model: the one whose answers are cut loses JSON, and the gate says so.
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_MAX_WORKERS", "1")
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION", "true")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a network for prices
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("evaluation")
    chosen = [
        prompt for prompt in PROMPTS if prompt["id"] in ("json-04", "json-05", "odd-12", "odd-16")
    ]

    @scorer
    def met(outputs, expectations):
        value, reason = meets(expectations["expected"], outputs)
        return Feedback(value=value, rationale=reason)

    def evaluate(**settings):
        model = load_chat(tiny.onnx_dir, **settings)

        @mlflow.trace
        def ask(id, request):
            if id == "odd-16":
                raise ValueError("not a refusal")
            try:
                return {
                    "answer": model.predict(None, request)[0]["choices"][0]["message"]["content"]
                }
            except MlflowException as error:
                return {"refused": error.message}

        table = mlflow.genai.evaluate(
            data=[
                {
                    "inputs": {"id": prompt["id"], "request": prompt["request"]},
                    "expectations": {"expected": prompt["expectations"]},
                }
                for prompt in chosen
            ],
            predict_fn=ask,
            scorers=[met],
        ).result_df
        model.close()
        return [
            {"id": asked["id"], "family": asked["id"][:-3], "met": value is True, "reason": reason}
            for asked, value, reason in zip(
                table["request"], table["met/value"], table["met/rationale"], strict=True
            )
        ]

    try:
        champion, challenger = evaluate(max_tokens=64), evaluate(max_tokens=2)
    finally:
        mlflow.set_tracking_uri(before)
    assert count_met(champion) == {"json": (2, 2), "odd": (1, 2)}
    assert {row["id"]: row["reason"] for row in champion}["odd-16"] == "failed"
    decision = gate(champion, challenger)
    assert not decision.promote
    assert {row[0] for row in decision.rows} == {"json-04", "json-05"}
    assert gate(challenger, champion, least_gained=2).promote
