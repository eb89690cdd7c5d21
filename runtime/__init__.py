"""What every process runs on. Nothing here knows what an account or a transfer is.

Read `endpoint` first (a call, and anything that answers one), then `methods` (what the .proto files
declare), `dispatcher` (servicers in this process), `grpc_server` and `grpc_client` (the same over the
network), `mesh` (the other centers) and `store` (units of work).
"""
