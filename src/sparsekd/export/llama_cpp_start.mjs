// Opens a GGUF file in llama.cpp, on the processor.
//
// packages  a folder with node_modules/node-llama-cpp
// model     the file
// threads
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

export async function start({packages, model, threads}) {
    let llama;
    try {
        const installed = createRequire(path.join(packages, "package.json"));
        const {getLlama} = await import(pathToFileURL(installed.resolve("node-llama-cpp")).href);
        llama = await getLlama({
            gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: threads,
            logLevel: "warn", logger: (level, message) => process.stderr.write(message.trimEnd() + "\n")
        });
    } catch (error) {
        process.stderr.write(error.message + "\n");
        process.exit(4); // it is the installation, not the file
    }
    return {llama, model: await llama.loadModel({modelPath: model})};
}
