// npm ci && npm run build: writes charts.min.js and the licences of what is in it to loratools/workflows/_vendor/echarts.
// The versions are package-lock.json's, and the same bytes come out on every machine.
import { createHash } from "node:crypto";
import { copyFileSync, readFileSync } from "node:fs";
import { build } from "esbuild";

const out = new URL("../../loratools/workflows/_vendor/echarts/", import.meta.url).pathname;
const version = name => JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
const banner = `/*! Apache ECharts ${version("echarts")} (Apache-2.0; LICENSE, NOTICE), with zrender ${version("zrender")} (BSD-3-Clause)
and tslib ${version("tslib")} (0BSD); only the parts named in tools/charts/charts.js */`;

await build({
  entryPoints: [new URL("charts.js", import.meta.url).pathname],
  outfile: `${out}charts.min.js`,
  bundle: true,
  minify: true,
  charset: "ascii",
  format: "iife",
  globalName: "echarts",
  target: "es2020",
  legalComments: "none",
  define: { "process.env.NODE_ENV": '"production"' },
  banner: { js: banner },
});
for (const [from, to] of [
  ["echarts/LICENSE", "LICENSE"], ["echarts/NOTICE", "NOTICE"], ["echarts/licenses/LICENSE-d3", "LICENSE.d3"],
  ["zrender/LICENSE", "LICENSE.zrender"], ["tslib/LICENSE.txt", "LICENSE.tslib"],
]) copyFileSync(new URL(`node_modules/${from}`, import.meta.url), out + to);

const bytes = readFileSync(`${out}charts.min.js`);
console.log(`${createHash("sha256").update(bytes).digest("hex")}  charts.min.js, ${bytes.length} bytes`);
