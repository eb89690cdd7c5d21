"""Makes the Python stubs in `duohuo/` from the .proto files: messages, gRPC stubs and type stubs.

Field rules come from buf/validate/validate.proto, which protovalidate brings along as a descriptor alone.
Its stubs are made too, in `buf/`, and `protos/image.binpb` for `buf lint`, which cannot know it otherwise.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb  # there is no public way to it

ROOT = Path(__file__).resolve().parent
_IS_IMPORT = b"\xd2\xf6\x03\x02\x08\x01"
"""Field 8042 of a file, `buf_extension`, with `is_import` (buf/alpha/image/v1/image.proto)."""
VALIDATE = "buf/validate/validate.proto"


def main() -> int:
    with tempfile.NamedTemporaryFile() as known:
        known.write(_known_files().SerializeToString())
        known.flush()
        ours = [str(path) for path in sorted(ROOT.glob("duohuo/**/*.proto"))]
        common = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--descriptor_set_in={known.name}",
        ]
        return (
            _stubs(common, [VALIDATE], grpc=False) or _stubs(common, ours) or _image(common, ours)
        )


def _known_files() -> descriptor_pb2.FileDescriptorSet:
    """validate.proto and what it imports."""
    modules = (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2)
    found = [module.DESCRIPTOR.serialized_pb for module in modules]
    found.append(validate_pb.desc().proto.to_binary())
    known = descriptor_pb2.FileDescriptorSet()
    for one in found:
        known.file.add().MergeFromString(one)
    return known


def _stubs(common: list[str], protos: list[str], *, grpc: bool = True) -> int:
    bin_dir, out = Path(sys.executable).parent, str(ROOT.parent)
    arguments = [
        *common,
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
    ]
    if grpc:
        arguments += [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    return int(protoc.main([*arguments, *protos]))


def _image(common: list[str], protos: list[str]) -> int:
    """What `buf lint` reads: our files, with those that they import marked as not ours."""
    path = ROOT / "image.binpb"
    arguments = ["--include_imports", "--include_source_info", f"--descriptor_set_out={path}"]
    failed = int(protoc.main([*common, *arguments, *protos]))
    image = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    for file in image.file:
        if not file.name.startswith("duohuo/"):
            file.MergeFromString(_IS_IMPORT)
    path.write_bytes(image.SerializeToString())
    return failed


if __name__ == "__main__":
    sys.exit(main())
