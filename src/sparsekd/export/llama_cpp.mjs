// What llama.cpp makes of a GGUF file. One JSON object on stdin, one on stdout; its log goes to stderr.
//
// in:  packages, model, threads   as for llama_cpp_start.mjs
//      windows   lists of token ids
//      wanted    for each position of each window, the token ids whose logits are asked for
//      prompt, generate   token ids to go on from, greedily, and how many tokens to add
//      text      to be split into tokens
// out: version   of llama.cpp
//      windows   for each position: best (the likeliest token), maximum (its logit), total (the sum of
//                exp(logit - maximum) over all tokens), logits (of those that were wanted)
//      generated, tokens
import {readFileSync} from "node:fs";
import {start} from "./llama_cpp_start.mjs";

const asked = JSON.parse(readFileSync(0, "utf8"));
const {llama, model} = await start(asked);
const longest = Math.max(asked.prompt.length + asked.generate, ...asked.windows.map((window) => window.length));
const context = await model.createContext({contextSize: longest + 1, batchSize: longest, threads: asked.threads});
const sequence = context.getSequence();
const greedy = {temperature: 0};

const windows = [];
for (const [index, tokens] of asked.windows.entries()) {
    await sequence.clearHistory();
    const items = tokens.map((token, position) => {
        const logits = {filter: {tokens: asked.wanted[index][position], includeSelected: true}};
        return [token, {generateNext: {token: true, totalLogitWeight: true, logits, options: greedy}}];
    });
    const found = await sequence.controlledEvaluate(items);
    windows.push(found.map(({next}, position) => ({
        best: next.token,
        maximum: next.logits.get(next.token),
        total: next.totalLogitWeight,
        logits: asked.wanted[index][position].map((token) => next.logits.get(token))
    })));
}

await sequence.clearHistory();
const generated = [];
let items = asked.prompt;
while (generated.length < asked.generate) {
    const last = [items.at(-1), {generateNext: {token: true, options: greedy}}];
    const found = await sequence.controlledEvaluate([...items.slice(0, -1), last]);
    generated.push(found.at(-1).next.token);
    items = generated.slice(-1);
}

const version = llama.llamaCppRelease.release;
const tokens = model.tokenize(asked.text);
await llama.dispose();
process.stdout.write(JSON.stringify({version, windows, generated, tokens}));
