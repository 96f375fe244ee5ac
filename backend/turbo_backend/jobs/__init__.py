"""Durable jobs: requests that outlive their caller's connection and the server's processes.

`storage` keeps bytes by `names`, `records` says what a job is, `steps` keeps what the denoiser has done, `store` holds
all jobs, `retention` forgets old ones, `queue` orders them, `runner` runs them (`ensemble`: by Triton; `outcome`: what
a failure means; `watching`: what it told), `lifecycle` opens and stops them, `service` answers the `jobs` model's
calls, `standstill` ends their process where it can do nothing any more.
"""
