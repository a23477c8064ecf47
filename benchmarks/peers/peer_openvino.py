"""OpenVINO driven by hand: the models that optimum-intel writes, and only those image tokens that are kept."""

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13
from openvino_files import EMBEDDING, LANGUAGE, VISION, convert, model_files
from serving import Model, StepwiseModel, Task, rows_kept, serve

_END = np.iinfo(np.int64).max


class OpenVino(StepwiseModel):
    """Three compiled models, the language model with its cache inside."""

    version = f"openvino {ov.get_version().partition('-')[0]}"

    def __init__(self, task: Task) -> None:
        core = ov.Core()
        properties = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        language = core.read_model(task.folder / f"{LANGUAGE}.xml")
        _leave_last_logits(language)
        self._vision, self._embedding = (
            core.compile_model(task.folder / f"{name}.xml", "CPU", properties).create_infer_request()
            for name in (VISION, EMBEDDING)
        )
        self._language = core.compile_model(language, "CPU", properties).create_infer_request()
        self._inputs = {name for value in language.inputs for name in value.names}
        self._task, self._pixels = task, np.load(task.pixels)
        self._length = 0
        self.files = model_files(task.folder)

    def encode(self) -> NDArray[Any]:
        return rows_kept(self._task, self._vision.infer([self._pixels])[0][0])

    def prefill(self, features: NDArray[Any]) -> int:
        self._language.reset_state()
        self._length = 0
        before, after = (self._embed(ids) for ids in (self._task.before, self._task.after))
        return self._run(np.concatenate((before, features[None], after), axis=1))

    def decode(self, token: int) -> int:
        return self._run(self._embed([token]))

    def _embed(self, ids: Any) -> NDArray[Any]:
        return self._embedding.infer([np.array([ids], np.int64)])[0].copy()

    def _run(self, embeds_1TD: NDArray[Any]) -> int:
        end = self._length + embeds_1TD.shape[1]
        inputs = {
            "inputs_embeds": embeds_1TD,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._length, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._length = end
        result = self._language.infer({name: value for name, value in inputs.items() if name in self._inputs})
        return int(result[0][0, -1].argmax())


def _leave_last_logits(model: ov.Model) -> None:
    """Put a slice in front of the head: as converted, it computes the logits of every token of the prompt."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    axes = [opset13.constant(np.array([value], np.int64)) for value in (-1, _END, 1, 1)]
    node.input(0).replace_source_output(opset13.slice(hidden, *axes).output(0))
    model.validate_nodes_and_infer_types()


def _open(task: Task) -> Model:
    return OpenVino(task)


if __name__ == "__main__":
    serve(convert, _open)
