"""Where bytes lie: one interface (`base.Store`), and one module per kind of store.

`uris` says which URIs there are and what they come to; `local`, `s3` and `memory` are the stores; `anywhere` hands each
URI to the store of its scheme, from one table; `lock` lets one driver at a time work on an output. No scheme is tested
for outside of this package.
"""
