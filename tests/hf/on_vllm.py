"""Run in an environment with vLLM: read a request as JSON from standard input, and print an answer as JSON.

A request has "folder" (exported), "trust" (its code), "prompts" (lists of token ids) and "new_tokens". The answer has the
"tokens" of each greedy continuation, the log-probabilities of each prompt's tokens from the second ("prompts") and of
the new ones ("new"), and tokens per second of a second call ("rate"), in which all prompts are repeated.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.load(sys.stdin)
    model = LLM(
        request["folder"],
        trust_remote_code=request["trust"],
        dtype="float32",
        max_model_len=256,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    most = {"max_tokens": request["new_tokens"], "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    outputs = model.generate(prompts, SamplingParams(**most, logprobs=0, prompt_logprobs=0), use_tqdm=False)
    start = time.perf_counter()
    written = model.generate(prompts * request["repeats"], SamplingParams(**most), use_tqdm=False)
    rate = sum(len(output.outputs[0].token_ids) for output in written) / (time.perf_counter() - start)
    answer = {"tokens": [[*output.outputs[0].token_ids] for output in outputs], "rate": rate}
    answer["prompts"] = [
        [table[token].logprob for table, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
        for output in outputs
    ]
    answer["new"] = [
        [table[token].logprob for table, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)]
        for output in outputs
    ]
    print("ANSWER", json.dumps(answer))


if __name__ == "__main__":
    main()
