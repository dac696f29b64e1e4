"""What tests run in ComfyUI's page, in JavaScript."""

# Drops a file [name, text] on the canvas.
DROP = """([name, text]) => {
    const carried = new DataTransfer()
    carried.items.add(new File([text], name, {type: 'application/json'}))
    const canvas = document.querySelector('#graph-canvas')
    const view = canvas.getBoundingClientRect()
    const where = {clientX: view.x + view.width / 2, clientY: view.y + view.height / 2, bubbles: true, cancelable: true}
    canvas.dispatchEvent(new DragEvent('drop', {...where, dataTransfer: carried}))
}"""

# Sets values of widgets: {type of a node: {widget: value}}.
SET = """values => {
    for (const [type, widgets] of Object.entries(values))
        for (const [name, value] of Object.entries(widgets))
            app.graph.nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = value
}"""
FIT = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
# [width, height, seconds, address] of the first video that is shown; null: there is none.
VIDEO = """() => {
    const shown = [...document.querySelectorAll('video')].filter(v => v.videoWidth && v.getClientRects().length)
    return shown.length ? [shown[0].videoWidth, shown[0].videoHeight, shown[0].duration, shown[0].currentSrc] : null
}"""

# A place of the canvas without a node, in pixels of the page.
EMPTY = """() => {
    const view = app.canvas.canvas.getBoundingClientRect()
    for (let y = view.bottom - 150; y > view.top + 150; y -= 40)
        for (let x = view.right - 150; x > view.left + 150; x -= 40) {
            const [left, top] = app.canvas.convertEventToCanvasOffset({clientX: x, clientY: y})
            const free = !app.graph.getNodeOnPos(left, top) && !app.graph.getGroupOnPos(left, top)
            if (free && document.elementFromPoint(x, y) === app.canvas.canvas) return [x, y]
        }
}"""
TOASTS = "[...document.querySelectorAll('.p-toast-message')].map(one => one.innerText)"
# The reports that nodes show (web/report.js).
REPORTS = "[...document.querySelectorAll('.ascend-report')].map(report => report.textContent)"
