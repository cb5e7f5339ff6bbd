// A model in llama.cpp that reads prompts and goes on from them. JSON objects, one a line; its log goes to stderr.
//
// in, first:  packages, model, threads   as for llama_cpp_start.mjs
// out, first: held     bytes that this process held before it opened the model
// in, then:   tokens   a list of token ids for each sequence
//             prompt   whether they are prompts, read anew, or follow what was read before
//             steps    how many tokens are to follow a prompt at most
// out, then:  next     the likeliest next token of each sequence
import {createInterface} from "node:readline";
import {start} from "../export/llama_cpp_start.mjs";

const lines = createInterface({input: process.stdin})[Symbol.asyncIterator]();
const answer = (found) => process.stdout.write(JSON.stringify(found) + "\n");
const asked = JSON.parse((await lines.next()).value);
const held = process.memoryUsage().rss;
const {model} = await start(asked);
answer({held});

const largestBatch = 2048; // tokens that are computed at once, as llama.cpp's own default
let context, sequences = [], shape = "";

async function open(count, length, steps) {
    if (shape === `${count} ${length}`)
        return Promise.all(sequences.map((sequence) => sequence.clearHistory()));
    await context?.dispose();
    context = await model.createContext({
        sequences: count, contextSize: length + steps + 1, batchSize: Math.min(count * length, largestBatch),
        threads: asked.threads
    });
    sequences = Array.from({length: count}, () => context.getSequence());
    shape = `${count} ${length}`;
}

async function next(sequence, tokens) {
    const last = [tokens.at(-1), {generateNext: {token: true, options: {temperature: 0}}}];
    return (await sequence.controlledEvaluate([...tokens.slice(0, -1), last])).at(-1).next.token;
}

for await (const line of lines) {
    const {tokens, prompt, steps} = JSON.parse(line);
    if (prompt)
        await open(tokens.length, tokens[0].length, steps);
    answer({next: await Promise.all(tokens.map((one, index) => next(sequences[index], one)))});
}
process.exit(0);
