"""lora-lite adapter files served by vLLM: a resolver that exports a file when a request names it, and an engine for
`lora-lite export … --verify vllm`. Nothing is to be imported; both are entry points."""
