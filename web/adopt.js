// Two entries in the canvas' menu: they swap the graph's loaders for ours, whose work all ranks do, and back. The server
// does it (nodes/stock/adoption.py), because it can read the model files.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { show, texts } from "./page.js"
import { TEXTS } from "./texts.js"

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
    const words = texts("adopt")
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
    { content: texts("adopt").adopt, callback: () => void swap(false) },
    { content: texts("adopt").back, callback: () => void swap(true) },
]

app.registerExtension({
    name: "AscendVideo.Adopt",
    commands: [
        { id: "AscendVideo.Adopt", label: TEXTS.en.adopt.adopt, icon: "pi pi-server", function: () => swap(false) },
        { id: "AscendVideo.AdoptBack", label: TEXTS.en.adopt.back, icon: "pi pi-undo", function: () => swap(true) },
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
