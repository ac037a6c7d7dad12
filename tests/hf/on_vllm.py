"""Run in an environment with vLLM: answer the request of `test_vllm.py` in standard input with a last line of JSON.

A request has an exported "folder", whether to "trust" its code, and "prompts" of token ids. The answer has, of each
prompt, the tokens of the "greedy" continuation and the log-probabilities ("scores") of all tokens from the second; and
the "rate" of a second call, tokens per second, in which all prompts are repeated.
"""

import json
import sys
import time

NEW_TOKENS = 16


def main() -> None:
    from vllm import LLM, SamplingParams  # the test that imports NEW_TOKENS runs without it

    request = json.load(sys.stdin)
    options = {"trust_remote_code": request["trust"], "dtype": "float32", "max_model_len": 256}
    model = LLM(request["folder"], **options, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    answer: dict[str, object] = {"greedy": [], "scores": []}
    for output in model.generate(prompts, greedy):
        new = output.outputs[0]
        answer["greedy"].append([*new.token_ids])
        tables = [*output.prompt_logprobs[1:], *new.logprobs]
        ids = [*output.prompt_token_ids[1:], *new.token_ids]
        answer["scores"].append([table[token].logprob for table, token in zip(tables, ids, strict=True)])
    greedy, start = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True), time.perf_counter()
    outputs = model.generate(prompts * request["repeats"], greedy)
    answer["rate"] = NEW_TOKENS * len(outputs) / (time.perf_counter() - start)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
