// What llama.cpp makes of a GGUF file. One JSON object on stdin, one on stdout; its log goes to stderr.
//
// in:  packages  a folder with node_modules/node-llama-cpp
//      model     the file
//      threads
//      windows   lists of token ids
//      wanted    for each position of each window, the token ids whose logits are asked for
//      prompt, generate   token ids to go on from, greedily, and how many tokens to add
//      text      to be split into tokens
// out: version   of llama.cpp
//      windows   for each position: best (the likeliest token), maximum (its logit), total (the sum of
//                exp(logit - maximum) over all tokens), logits (of those that were wanted)
//      generated, tokens
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
let llama;
try {
    const installed = createRequire(path.join(asked.packages, "package.json"));
    const {getLlama} = await import(pathToFileURL(installed.resolve("node-llama-cpp")).href);
    llama = await getLlama({
        gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: asked.threads,
        logLevel: "warn", logger: (level, message) => process.stderr.write(message.trimEnd() + "\n")
    });
} catch (error) {
    process.stderr.write(error.message + "\n");
    process.exit(4); // it is the installation, not the file
}
const model = await llama.loadModel({modelPath: asked.model});
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
