"""Stores of bytes: one interface (`base.Store`) and one module per kind of store.

`uris` parses URIs; `local`, `s3`, `gcs`, `azure` and `memory` are the stores; `anywhere` hands each URI to the store of
its scheme; `arrow_files` shows a store to Ray; `lock` lets one driver at a time work on an output. Only this package
tests for a scheme.
"""
