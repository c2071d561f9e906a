// node wasm.mjs PROGRAM.wasm: its get, put and exit status are this process's.
import { readFileSync, writeSync } from "node:fs";

const [input, output] = [readFileSync(0), []];
let here = 0;
const get = () => (here < input.length ? input[here++] : -1);
const machine = { env: { get, put: (byte) => output.push(byte) } };
const { instance } = await WebAssembly.instantiate(readFileSync(process.argv[2]), machine);
process.exitCode = instance.exports.main();
for (let rest = Buffer.from(output); rest.length > 0; rest = rest.subarray(writeSync(1, rest)));
