"""Makes the Python stubs in `duohuo/` from the .proto files: messages, gRPC stubs and type stubs."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def main() -> int:
    bin_dir = Path(sys.executable).parent
    out = str(ROOT.parent)
    arguments = [
        "protoc",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--proto_path={ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(path) for path in sorted(ROOT.glob("duohuo/**/*.proto"))),
    ]
    return int(protoc.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
