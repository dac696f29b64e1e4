// Shows what a node has to say of its last run: Ascend Sampler, what the video took and what accelerators saved; Ascend
// Text Encode, where a prompt was cut. ComfyUI's page removes a text that was sent while a job ran once it ends; what a
// node puts out (`ui` in nodes/sampler.py, nodes/conditioning.py) stays.
import { app } from "../../scripts/app.js"

const NODES = ["AscendSampler", "AscendSamplerAdvanced", "AscendTextEncode"]
const WIDGET = "report"
const HEIGHT = 64 // pixels, about four lines; more can be scrolled

function addReport(node) {
    const element = document.createElement("div")
    element.className = "ascend-report"
    element.style.cssText =
        "overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; padding: 4px 8px;" +
        "color: var(--input-text); background: var(--comfy-input-bg); font-size: 11px; line-height: 1.3;" +
        `border-radius: 4px; box-sizing: border-box; max-height: ${HEIGHT}px`
    element.addEventListener("wheel", event => event.stopPropagation()) // scrolls the text, not the canvas
    const widget = node.addDOMWidget(WIDGET, "ascend-report", element, {
        serialize: false, // of the prompt
        getMinHeight: () => HEIGHT,
        getMaxHeight: () => HEIGHT,
        getValue: () => element.textContent,
        setValue: text => (element.textContent = text),
    })
    widget.serialize = false // of the saved workflow
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
    return widget
}

function showReport(node, output) {
    if (!NODES.includes(node?.type) || !output?.text) return
    const text = output.text.join("\n")
    const shown = node.widgets.find(({ name }) => name === WIDGET)
    if (!text && !shown) return // most prompts have nothing to be said of
    const widget = shown ?? addReport(node)
    widget.value = text
    node.setDirtyCanvas(true)
}

app.registerExtension({
    name: "AscendVideo.Report",
    beforeRegisterNodeDef(nodeType, { name }) {
        if (!NODES.includes(name)) return
        const { onExecuted } = nodeType.prototype
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments)
            showReport(this, output)
        }
    },
    // A workflow is shown again: from another tab, or from the list of what was run.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) showReport(app.graph.getNodeById(id), output)
    },
})
