// What the modules of this folder share: texts in the page's language, and messages.
import { app } from "../../scripts/app.js"
import { TEXTS } from "./texts.js"

export const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets" // a setting of pages whose Nodes 2.0 know advanced inputs
const SHOWN_FOR = 20000 // milliseconds

export const setting = name => app.extensionManager?.setting?.get(name) ?? app.ui?.settings?.getSettingValue(name)

// The texts of one module (see texts.js) in the page's language, or in English.
export function texts(module) {
    const language = `${setting("Comfy.Locale") ?? "en"}`.slice(0, 2)
    return (TEXTS[language] ?? TEXTS.en)[module]
}

// severity: "success", "warn" or "error". lines: what stands below the summary.
export function show(severity, summary, lines = []) {
    const detail = lines.join("\n")
    const toast = app.extensionManager?.toast
    if (toast) toast.add({ severity, summary, detail, life: SHOWN_FOR })
    else alert([summary, ...lines].join("\n"))
}

// A store of the page, such as "nodeDef"; undefined if this page has none of the name.
export const store = name =>
    document.querySelector("#vue-app")?.__vue_app__?.config.globalProperties.$pinia?._s.get(name)

export const pageKnowsAdvanced = () => ALWAYS in (app.ui?.settings?.settingsParamLookup ?? {})

// The first Nodes 2.0 read a node's widgets and their options when the node is added, and its height when it is first drawn.
export function drawAgain(node) {
    if (!node.graph || !LiteGraph.vueNodesMode || pageKnowsAdvanced()) return
    node.graph.onNodeAdded?.(node)
    document.querySelector(`[data-node-id="${node.id}"]`)?.style.setProperty("--node-height", `${node.size[1]}px`)
}
