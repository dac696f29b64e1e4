// Two entries in the canvas' menu: they swap the graph's loaders for ours, whose work all ranks do, and back. The server
// does it (nodes/stock/adoption.py), because it can read the model files.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const TEXTS = {
    en: {
        adopt: "Swap loaders to run on all ranks (Ascend)",
        back: "Swap loaders back to core's (Ascend)",
        swapped: count => `${count} ${count === 1 ? "loader" : "loaders"} swapped`,
        nothing: "No loader was swapped",
        left: "Not swapped:",
        failed: "The loaders could not be swapped",
    },
    zh: {
        adopt: "替换加载器，在所有 rank 上运行（昇腾）",
        back: "换回核心加载器（昇腾）",
        swapped: count => `已替换 ${count} 个加载器`,
        nothing: "没有可替换的加载器",
        left: "未替换：",
        failed: "无法替换加载器",
    },
}
const SHOWN_FOR = 20000 // milliseconds

function texts() {
    const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? app.ui?.settings?.getSettingValue("Comfy.Locale")
    return TEXTS[`${locale ?? "en"}`.slice(0, 2)] ?? TEXTS.en
}

function show(severity, summary, lines = []) {
    const detail = lines.join("\n")
    const toast = app.extensionManager?.toast
    if (toast) toast.add({ severity, summary, detail, life: SHOWN_FOR })
    else alert([summary, ...lines].join("\n"))
}

// Puts the graph on the canvas in the tab that is open, as one change that can be undone. A page that loads a graph
// otherwise takes it as saved.
async function open(graph, before) {
    const workflow = app.extensionManager?.workflow?.activeWorkflow ?? null
    const tracker = workflow?.changeTracker
    const saved = tracker?.initialState
    await app.loadGraphData(graph, true, false, workflow)
    if (!tracker) return
    tracker.initialState = saved
    tracker.undoQueue?.push(before)
    tracker.updateModified?.()
}

async function swap(back) {
    const words = texts()
    const before = JSON.parse(JSON.stringify(app.graph.serialize()))
    const request = { method: "POST", headers: { "Content-Type": "application/json" },
                      body: JSON.stringify({ workflow: before, back }) }
    let answer
    try {
        answer = await (await api.fetchApi("/ascend_video/adopt", request)).json()
    } catch (error) {
        return show("error", words.failed, [`${error}`])
    }
    if (answer.error) return show("error", words.failed, [answer.error])
    const left = answer.left.map(({ node, reason }) => `${node}: ${reason}.`)
    const lines = [...answer.notes, ...(left.length ? [words.left, ...left] : [])]
    if (!answer.swapped.length) return show("warn", words.nothing, lines)
    await open(answer.workflow, before)
    show(lines.length ? "warn" : "success", words.swapped(answer.swapped.length), lines)
}

const entries = () => [
    null,
    { content: texts().adopt, callback: () => void swap(false) },
    { content: texts().back, callback: () => void swap(true) },
]

app.registerExtension({
    name: "AscendVideo.Adopt",
    commands: [
        { id: "AscendVideo.Adopt", label: TEXTS.en.adopt, icon: "pi pi-server", function: () => swap(false) },
        { id: "AscendVideo.AdoptBack", label: TEXTS.en.back, icon: "pi pi-undo", function: () => swap(true) },
    ],
    getCanvasMenuItems: entries,
    setup() {
        if (app.collectCanvasMenuItems) return // the page asks getCanvasMenuItems
        const { prototype } = window.LGraphCanvas
        const { getCanvasMenuOptions } = prototype
        prototype.getCanvasMenuOptions = function () {
            return [...getCanvasMenuOptions.apply(this, arguments), ...entries()]
        }
    },
})
