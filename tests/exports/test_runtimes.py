"""What a runtime makes of a file that is none of its own."""

from pathlib import Path

import pytest

from lorica.config import ConfigError
from lorica.exports.gguf import GgufScorer
from lorica.exports.onnx import OnnxScorer


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"no model at all" * 100])
@pytest.mark.parametrize(("package", "scorer"), [("onnxruntime", OnnxScorer), ("llama_cpp", lambda file: GgufScorer(file, 8))])
def test_a_file_that_can_not_be_loaded_is_one_line(package: str, scorer: type, content: bytes, tmp_path: Path) -> None:
    pytest.importorskip(package)
    file = tmp_path / "model"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="can't load it"):
        scorer(file)
