// Turns the cards of a deck (updates, studies) by buttons, arrow keys, links and filters; tells a token's numbers.
document.documentElement.className = "js";
const decks = [...document.querySelectorAll(".deck")].filter((deck) => deck.querySelector(".card"));

const cardsOf = (deck) => [...deck.querySelectorAll(".card")].filter((card) => !card.dataset.out);

function show(deck, card) {
  for (const other of deck.querySelectorAll(".card")) other.classList.toggle("on", other === card);
  const cards = cardsOf(deck);
  deck.querySelector(".turn select").value = card ? card.id : "";
  deck.querySelector(".turn output").textContent = cards.length ? `${cards.indexOf(card) + 1} of ${cards.length}` : "none";
}

function step(deck, by) {
  const cards = cardsOf(deck);
  const place = cards.findIndex((card) => card.classList.contains("on"));
  if (cards.length) show(deck, cards[Math.min(Math.max(place + by, 0), cards.length - 1)]);
}

function filter(deck) {
  const [policy] = deck.querySelectorAll(".filter select");
  const wanted = [...deck.querySelectorAll(".filter input:checked")].map((box) => box.value);
  const fits = (card, what) => what === "differs" ? card.dataset.differs : card.dataset[what].split(" ").includes(policy.value);
  for (const card of deck.querySelectorAll(".card")) card.dataset.out = wanted.every((what) => fits(card, what)) ? "" : "yes";
  for (const option of deck.querySelectorAll(".turn option")) {
    option.hidden = option.disabled = Boolean(document.getElementById(option.value).dataset.out);
  }
  show(deck, cardsOf(deck)[0]);
}

// the deck that the keys turn: the one that has the focus, else the one in the middle of the window
function current() {
  const middle = window.innerHeight / 2;
  const far = (deck) => Math.max(deck.getBoundingClientRect().top - middle, middle - deck.getBoundingClientRect().bottom, 0);
  return document.activeElement.closest(".deck") || decks.slice().sort((a, b) => far(a) - far(b))[0];
}

function follow() {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!card?.classList.contains("card")) return;
  show(card.closest(".deck"), card);
  card.scrollIntoView();
}

// the bar above a deck's cards, which turns them: made here, as without this script it would do nothing
function addBar(deck, what) {
  deck.querySelector(".card").insertAdjacentHTML("beforebegin", `<nav class="turn" aria-label="choose the ${what}">
    <button data-step="-1" title="the ${what} before (arrow key)">←</button> <select aria-label="${what}"></select>
    <button data-step="1" title="the next ${what} (arrow key)">→</button> <output aria-live="polite"></output></nav>`);
  const titles = [...deck.querySelectorAll(".card")].map((card) => new Option(card.querySelector("h3").textContent, card.id));
  deck.querySelector(".turn select").append(...titles);
}

for (const deck of decks) {
  addBar(deck, { update: "update", writes: "study" }[deck.id]);
  show(deck, cardsOf(deck)[0]);
  deck.querySelector(".turn select").onchange = (event) => show(deck, document.getElementById(event.target.value));
  for (const button of deck.querySelectorAll("[data-step]")) button.onclick = () => step(deck, Number(button.dataset.step));
  deck.querySelector(".filter")?.addEventListener("change", () => filter(deck));
}
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, input") || !decks.length) return;
  event.preventDefault();
  step(current(), by);
});
document.addEventListener("click", (event) => {
  const token = event.target.closest(".tokens i[title]");
  if (!token) return;
  document.querySelector("i.picked")?.classList.remove("picked");
  token.classList.add("picked");
  token.closest(".tokens").querySelector("output").textContent = `“${token.textContent.trim()}”: ${token.title}`;
});
window.addEventListener("hashchange", follow);
window.addEventListener("beforeprint", () => document.querySelectorAll(".card.on details").forEach((x) => { x.open = true; }));
follow();
