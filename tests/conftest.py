"""Set before anything imports gRPC."""

import os

# Tests that have used gRPC start processes: its handlers around a fork would meet its threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
