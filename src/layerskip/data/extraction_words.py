"""Words and phrases of the extraction rows in four languages.

Every fifth of a list of values, and of the phrases that make a message an order, an appointment, contact
details or an expense, is held out. Values are many, so that a model learns to copy them and not a list.
"""

from dataclasses import dataclass


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


@dataclass(frozen=True, kw_only=True)
class Language:
    """Phrases and values of one language.

    Attributes:
        code: of ISO 639.
        phrases: of each kind of message, and of each further field. {} marks a value.
        labels: of a terse message's fields, such as "Item: oak shelves".
        items: first and second words of each kind of message that has any.
        joint: between the two words of an item.
        months: from January.
        numbers: words for 2 to 12.
        dates: forms of a date; `month` is a word, `day` and `number` are without leading zeros.
        times: forms of a time of day; those with `hour12` are for languages that use am and pm.
        amounts: forms of an amount of money.
        comma: of decimal numbers.
        greetings: before the message.
        asides: sentences that hold no field.
    """

    code: str
    phrases: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]
    items: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    joint: str
    months: tuple[str, ...]
    numbers: tuple[str, ...]
    dates: tuple[str, ...]
    times: tuple[str, ...]
    amounts: tuple[str, ...]
    comma: str
    greetings: tuple[str, ...]
    asides: tuple[str, ...]


ENGLISH = Language(
    code="en",
    phrases={
        "order": _lines("""
            I'd like to order {quantity} {item}
            Please send me {quantity} {item}
            We need {quantity} x {item}
            {quantity} {item}, please
            Could you put {quantity} {item} aside for us
            New order: {item}, {quantity} pcs
            Can I get {quantity} of your {item}
            We ran out of {item}, so {quantity} more would help
            Add {item} to my basket, {quantity} of them
            I'm going to need {quantity} {item}"""),
        "appointment": _lines("""
            I'd like to book a {item}
            Can we meet for the {item}
            Please put the {item} into the calendar
            The {item} has been moved
            Is there a free slot for a {item}
            Reminder: {item}
            Let's do the {item}
            You have an appointment, {item}
            I need a {item} soon
            We confirm your {item}"""),
        "contact": _lines("""
            {name} has a new address: {contact}
            You can reach {name} at {contact}
            Please save {contact} for {name}
            My new contact is {contact}, {name}
            For questions write to {name}, {contact}
            {name} changed to {contact}
            The details of {name}: {contact}
            Update the entry of {name} to {contact}
            {contact} belongs to {name} now
            New in the address book: {name}, {contact}"""),
        "expense": _lines("""
            I paid {amount} for {item}
            Expense: {item}, {amount}
            {amount} went on {item}
            Please refund {amount}, it was {item}
            {item} came to {amount}
            The bill for {item} says {amount}
            Spent {amount} on {item}
            {item} cost me {amount}
            Here is the receipt for {item}: {amount}
            I had to pay {amount} for {item}"""),
        "name": _lines("""
            My name is {name}
            This is {name}
            It is for {name}
            Ask for {name}
            Regards, {name}
            {name} will be there
            {name} here
            Signed, {name}
            Put it under {name}
            All the best, {name}"""),
        "place": _lines("""
            It is in {place}
            Place: {place}
            We are in {place}
            That would be in {place}
            The location is {place}
            {place} as always
            The address is in {place}
            It was in {place}
            Somewhere in {place}
            You find us in {place}"""),
        "date": _lines("""
            The date is {date}
            On {date}
            It has to be {date}
            Make it {date}
            {date} is the day
            That was or will be {date}
            Note {date}
            Date: {date}
            {date} suits us
            Nothing but {date} is possible"""),
        "time": _lines("""
            At {time}
            The time is {time}
            Around {time}
            {time} is best
            It starts at {time}
            Not before {time}
            Time: {time}
            {time} would be good
            Let's say {time}
            {time} sharp"""),
        "amount": _lines("""
            It may cost {amount}
            The total is {amount}
            We agreed on {amount}
            Price: {amount}
            I'd pay up to {amount}
            {amount} in all
            You offered {amount}
            The price was {amount}
            For {amount}, as agreed
            Your offer says {amount}"""),
        "contact detail": _lines("""
            Reach me at {contact}
            Write to {contact}
            My contact: {contact}
            Questions to {contact}
            Answer to {contact} please
            {contact} reaches us
            Confirm to {contact}
            Use {contact}
            You have {contact} for questions
            I am at {contact}"""),
    },
    labels={
        "order": _words("Order, Purchase, To buy, Shop order, Goods ordered"),
        "appointment": _words("Appointment, Meeting, Calendar, Date made, Booking"),
        "contact": _words("Contact, Address book, New contact, Person, Contact card"),
        "expense": _words("Expense, Receipt, Costs, Spent, Bill"),
        "item": _words("Item, What, Subject, About, Thing"),
        "quantity": _words("Quantity, Number, Pieces, Count, How many"),
        "name": _words("Name, Person, Who, For, From"),
        "place": _words("Place, City, Where, Location, Town"),
        "date": _words("Date, Day, When, On, The day"),
        "time": _words("Time, At, Hour, Clock, Start"),
        "amount": _words("Amount, Price, Cost, Total, Sum"),
        "contact detail": _words("Contact, Reach, Reply to, Details, Mail or phone"),
    },
    items={
        "order": (
            _words(
                "oak, steel, garden, blue, folding, office, kitchen, travel, wool, paper, round,"
                " silver, outdoor, cotton, bamboo, leather, glass, red, wall, heavy"
            ),
            _words(
                "shelves, lamps, chairs, boxes, blankets, baskets, bottles, frames, cushions, hooks,"
                " tables, trays, curtains, clocks, cups, bags, mirrors, towels, stools, lanterns"
            ),
        ),
        "appointment": (
            _words(
                "budget, design, project, dental, yearly, team, tax, contract, sales, first, house,"
                " language, kickoff, quarterly, safety, piano, planning, eye, legal, energy"
            ),
            _words(
                "review, check, lesson, meeting, interview, workshop, inspection, consultation, tour,"
                " briefing, session, talk, exam, demo, visit"
            ),
        ),
        "expense": (
            _words(
                "train, office, client, parking, hotel, conference, printer, museum, rental, airport,"
                " software, phone, cleaning, taxi, courier, library, training, ferry, studio, garage"
            ),
            _words(
                "tickets, supplies, lunch, fee, invoice, bill, service, pass, deposit, charges, costs,"
                " order, card, repair, subscription"
            ),
        ),
    },
    joint=" ",
    months=_words(
        "January, February, March, April, May, June, July, August, September, October, November,"
        " December"
    ),
    numbers=_words("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"),
    dates=("{day} {month}", "{month} {day}", "{day} {month} 2026", "2026-{number:02}-{day:02}"),
    times=("{hour}:{minute:02}", "{hour12}:{minute:02} {half}"),
    amounts=("{sign}{number}", "{number} {code}", "{code} {number}"),
    comma=".",
    greetings=_words("Hi, Hello, Good morning, Hi there, Dear all, Hey, Dear team"),
    asides=_lines("""
        Thanks a lot
        The weather is awful here
        I have been a customer for 6 years
        Sorry for the short notice
        My reference is 58213
        Please hurry
        The last one was great
        See you soon
        We talked about it last week
        I'm on the bus, line 14"""),
)

GERMAN = Language(
    code="de",
    phrases={
        "order": _lines("""
            Ich möchte {quantity} {item} bestellen
            Bitte schicken Sie mir {quantity} {item}
            Wir brauchen {quantity} x {item}
            {quantity} {item}, bitte
            Legen Sie mir bitte {quantity} {item} zurück
            Neue Bestellung: {item}, {quantity} Stück
            Ich nehme {quantity} von den {item}
            Uns fehlen {item}, also bitte {quantity} davon
            {quantity} mal {item} für uns
            Ich hätte gern {quantity} {item}"""),
        "appointment": _lines("""
            Ich möchte einen Termin: {item}
            Können wir uns treffen, wegen {item}
            Bitte in den Kalender eintragen: {item}
            Der Termin {item} wurde verschoben
            Haben Sie noch etwas frei für {item}
            Erinnerung: {item}
            Machen wir {item}
            Sie haben einen Termin, {item}
            Ich brauche bald {item}
            Wir bestätigen: {item}"""),
        "contact": _lines("""
            {name} hat eine neue Adresse: {contact}
            {name} ist unter {contact} zu erreichen
            Bitte {contact} für {name} speichern
            Mein neuer Kontakt ist {contact}, {name}
            Bei Fragen an {name} schreiben, {contact}
            {name} hat jetzt {contact}
            Die Daten von {name}: {contact}
            Den Eintrag von {name} bitte auf {contact} ändern
            {contact} gehört jetzt {name}
            Neu im Adressbuch: {name}, {contact}"""),
        "expense": _lines("""
            Ich habe {amount} für {item} bezahlt
            Ausgabe: {item}, {amount}
            {amount} gingen für {item} weg
            Bitte {amount} erstatten, das war {item}
            {item} kam auf {amount}
            Die Rechnung für {item} lautet auf {amount}
            {amount} ausgegeben für {item}
            {item} hat {amount} gekostet
            Hier der Beleg für {item}: {amount}
            Ich musste {amount} für {item} auslegen"""),
        "name": _lines("""
            Mein Name ist {name}
            Hier ist {name}
            Es ist für {name}
            Fragen Sie nach {name}
            Viele Grüße, {name}
            {name} ist dabei
            {name} hier
            Gezeichnet, {name}
            Auf den Namen {name}
            Mit freundlichen Grüßen {name}"""),
        "place": _lines("""
            Es ist in {place}
            Ort: {place}
            Wir sind in {place}
            Das wäre in {place}
            Der Ort ist {place}
            Wie immer {place}
            Die Adresse ist in {place}
            Das war in {place}
            Irgendwo in {place}
            Sie finden uns in {place}"""),
        "date": _lines("""
            Das Datum ist der {date}
            Am {date}
            Es muss der {date} sein
            Nehmen wir den {date}
            Der {date} ist der Tag
            Das ist oder war am {date}
            Notiert ist der {date}
            Datum: {date}
            Der {date} passt uns
            Möglich ist nur der {date}"""),
        "time": _lines("""
            Um {time}
            Die Uhrzeit ist {time}
            Gegen {time}
            {time} ist am besten
            Es beginnt um {time}
            Nicht vor {time}
            Uhrzeit: {time}
            {time} wäre gut
            Sagen wir {time}
            Pünktlich {time}"""),
        "amount": _lines("""
            Es darf {amount} kosten
            Zusammen sind es {amount}
            Vereinbart waren {amount}
            Preis: {amount}
            Ich zahle bis zu {amount}
            {amount} insgesamt
            Sie haben {amount} angeboten
            Der Preis war {amount}
            Für {amount}, wie besprochen
            Im Angebot stehen {amount}"""),
        "contact detail": _lines("""
            Ich bin unter {contact} erreichbar
            Schreiben Sie an {contact}
            Mein Kontakt: {contact}
            Fragen an {contact}
            Antwort bitte an {contact}
            {contact} erreicht uns
            Bestätigung an {contact}
            Nehmen Sie {contact}
            Für Fragen haben Sie {contact}
            Kontakt ist {contact}"""),
    },
    labels={
        "order": _words("Bestellung, Einkauf, Zu kaufen, Auftrag, Bestellte Ware"),
        "appointment": _words("Termin, Treffen, Kalender, Verabredung, Buchung"),
        "contact": _words("Kontakt, Adressbuch, Neuer Kontakt, Person, Kontaktkarte"),
        "expense": _words("Ausgabe, Beleg, Kosten, Ausgegeben, Rechnung"),
        "item": _words("Artikel, Was, Thema, Betrifft, Sache"),
        "quantity": _words("Menge, Anzahl, Stück, Zahl, Wie viele"),
        "name": _words("Name, Person, Wer, Für, Von"),
        "place": _words("Ort, Stadt, Wo, Adresse, Wohnort"),
        "date": _words("Datum, Tag, Wann, Am, Der Tag"),
        "time": _words("Uhrzeit, Um, Zeit, Uhr, Beginn"),
        "amount": _words("Betrag, Preis, Kosten, Summe, Gesamt"),
        "contact detail": _words("Kontakt, Erreichbar, Antwort an, Daten, Mail oder Telefon"),
    },
    items={
        "order": (
            _words(
                "Holz, Stahl, Garten, Büro, Küchen, Reise, Kinder, Wand, Glas, Papier, Baumwoll,"
                " Leder, Metall, Keller, Bambus, Camping, Werkzeug, Kunststoff, Stand, Schul"
            ),
            _words(
                "regale, lampen, stühle, boxen, decken, körbe, flaschen, rahmen, kissen, haken,"
                " tische, schalen, taschen, uhren, becher"
            ),
        ),
        "appointment": (
            _words(
                "Budget, Projekt, Zahn, Jahres, Team, Steuer, Vertrags, Verkaufs, Haus, Sprach,"
                " Sicherheits, Klavier, Planungs, Rechts, Energie"
            ),
            _words(
                "termin, prüfung, stunde, besprechung, beratung, besichtigung, kontrolle, seminar,"
                " gespräch, führung"
            ),
        ),
        "expense": (
            _words(
                "Bahn, Büro, Park, Hotel, Tagungs, Drucker, Museums, Miet, Flughafen, Software,"
                " Telefon, Reinigungs, Taxi, Kurier, Bibliotheks"
            ),
            _words(
                "karten, material, gebühr, rechnung, kosten, pauschale, service, beitrag, zuschlag,"
                " gutschein"
            ),
        ),
    },
    joint="",
    months=_words(
        "Januar, Februar, März, April, Mai, Juni, Juli, August, September, Oktober, November,"
        " Dezember"
    ),
    numbers=_words("zwei, drei, vier, fünf, sechs, sieben, acht, neun, zehn, elf, zwölf"),
    dates=("{day}. {month}", "{day}. {month} 2026", "{day:02}.{number:02}.2026", "{day}.{number}."),
    times=("{hour}:{minute:02} Uhr", "{hour}.{minute:02} Uhr", "{hour}:{minute:02}"),
    amounts=("{number} {sign}", "{number} {code}", "{code} {number}"),
    comma=",",
    greetings=_words("Hallo, Guten Tag, Moin, Liebes Team, Guten Morgen, Servus"),
    asides=_lines("""
        Vielen Dank
        Das Wetter ist furchtbar
        Ich bin seit 6 Jahren Kunde
        Entschuldigen Sie die Eile
        Mein Zeichen ist 58213
        Bitte schnell
        Das letzte Mal war es super
        Bis bald
        Wir sprachen letzte Woche davon
        Ich sitze in der Linie 14"""),
)

FRENCH = Language(
    code="fr",
    phrases={
        "order": _lines("""
            Je voudrais commander {quantity} {item}
            Envoyez-moi {quantity} {item} s'il vous plaît
            Il nous faut {quantity} x {item}
            {quantity} {item}, merci
            Pouvez-vous mettre de côté {quantity} {item}
            Nouvelle commande : {item}, {quantity} pièces
            Je prends {quantity} de vos {item}
            Nous n'avons plus de {item}, donc {quantity} de plus
            {quantity} fois {item} pour nous
            J'aurais besoin de {quantity} {item}"""),
        "appointment": _lines("""
            Je voudrais un rendez-vous : {item}
            Peut-on se voir pour {item}
            À noter dans l'agenda : {item}
            Le rendez-vous {item} est déplacé
            Avez-vous une place pour {item}
            Rappel : {item}
            Faisons {item}
            Vous avez un rendez-vous, {item}
            Il me faut bientôt {item}
            Nous confirmons : {item}"""),
        "contact": _lines("""
            {name} a une nouvelle adresse : {contact}
            {name} est joignable à {contact}
            Notez {contact} pour {name}
            Mon nouveau contact est {contact}, {name}
            Pour toute question, écrire à {name}, {contact}
            {name} a maintenant {contact}
            Les coordonnées de {name} : {contact}
            Changez la fiche de {name} en {contact}
            {contact} est désormais à {name}
            Nouveau dans le carnet : {name}, {contact}"""),
        "expense": _lines("""
            J'ai payé {amount} pour {item}
            Dépense : {item}, {amount}
            {amount} sont partis en {item}
            Merci de rembourser {amount}, c'était {item}
            {item} est revenu à {amount}
            La facture pour {item} est de {amount}
            Dépensé {amount} pour {item}
            {item} a coûté {amount}
            Voici le reçu pour {item} : {amount}
            J'ai dû avancer {amount} pour {item}"""),
        "name": _lines("""
            Je m'appelle {name}
            Ici {name}
            C'est pour {name}
            Demandez {name}
            Cordialement, {name}
            {name} sera là
            De la part de {name}
            Signé, {name}
            Au nom de {name}
            Bien à vous, {name}"""),
        "place": _lines("""
            C'est à {place}
            Lieu : {place}
            Nous sommes à {place}
            Ce serait à {place}
            Le lieu est {place}
            {place} comme toujours
            L'adresse est à {place}
            C'était à {place}
            Quelque part à {place}
            Vous nous trouvez à {place}"""),
        "date": _lines("""
            La date est le {date}
            Le {date}
            Il faut que ce soit le {date}
            Prenons le {date}
            Le {date} est le jour
            C'est ou c'était le {date}
            Notez le {date}
            Date : {date}
            Le {date} nous convient
            Seul le {date} est possible"""),
        "time": _lines("""
            À {time}
            L'heure est {time}
            Vers {time}
            {time} est le mieux
            Cela commence à {time}
            Pas avant {time}
            Heure : {time}
            {time} serait bien
            Disons {time}
            {time} précises"""),
        "amount": _lines("""
            Cela peut coûter {amount}
            Le total est de {amount}
            Nous avons convenu de {amount}
            Prix : {amount}
            Je paierai jusqu'à {amount}
            {amount} en tout
            Vous avez proposé {amount}
            Le prix était de {amount}
            Pour {amount}, comme convenu
            Votre devis dit {amount}"""),
        "contact detail": _lines("""
            Je suis joignable à {contact}
            Écrivez à {contact}
            Mon contact : {contact}
            Questions à {contact}
            Réponse à {contact}
            {contact} pour nous joindre
            Confirmez à {contact}
            Utilisez {contact}
            Vous avez {contact} pour les questions
            Je suis au {contact}"""),
    },
    labels={
        "order": _words("Commande, Achat, À acheter, Bon, Articles commandés"),
        "appointment": _words("Rendez-vous, Réunion, Agenda, Rencontre, Réservation"),
        "contact": _words("Contact, Carnet, Nouveau contact, Personne, Fiche"),
        "expense": _words("Dépense, Reçu, Frais, Dépensé, Facture"),
        "item": _words("Article, Quoi, Objet, Sujet, Chose"),
        "quantity": _words("Quantité, Nombre, Pièces, Unités, Combien"),
        "name": _words("Nom, Personne, Qui, Pour, De"),
        "place": _words("Lieu, Ville, Où, Adresse, Endroit"),
        "date": _words("Date, Jour, Quand, Le, Le jour"),
        "time": _words("Heure, À, Horaire, Début, Commence"),
        "amount": _words("Montant, Prix, Coût, Total, Somme"),
        "contact detail": _words("Contact, Joindre, Répondre à, Coordonnées, Mail ou téléphone"),
    },
    items={
        "order": (
            _words(
                "étagères, lampes, chaises, boîtes, couvertures, paniers, bouteilles, cadres,"
                " coussins, crochets, tables, plateaux, sacs, horloges, tabourets"
            ),
            _words(
                "en bois, de jardin, de bureau, en verre, de voyage, de cuisine, en acier, bleus,"
                " en papier, en coton, pliants, en cuir, pour enfants, en bambou, en métal"
            ),
        ),
        "appointment": (
            _words(
                "réunion, visite, cours, entretien, bilan, contrôle, présentation, séance, atelier,"
                " examen"
            ),
            _words(
                "de budget, de projet, de piano, annuel, technique, de vente, de langue, de sécurité,"
                " juridique, d'équipe, du contrat, dentaire, d'énergie, de planification, du studio"
            ),
        ),
        "expense": (
            _words(
                "billets, repas, frais, facture, location, abonnement, service, forfait, dépôt,"
                " réparation"
            ),
            _words(
                "de train, de bureau, d'hôtel, de conférence, d'imprimante, de musée, de voiture,"
                " de téléphone, de parking, de nettoyage, de taxi, d'avion, de logiciel, de bateau,"
                " de garage"
            ),
        ),
    },
    joint=" ",
    months=_words(
        "janvier, février, mars, avril, mai, juin, juillet, août, septembre, octobre, novembre,"
        " décembre"
    ),
    numbers=_words("deux, trois, quatre, cinq, six, sept, huit, neuf, dix, onze, douze"),
    dates=("{day} {month}", "{day} {month} 2026", "{day:02}/{number:02}/2026", "{day}/{number}"),
    times=("{hour}h{minute:02}", "{hour} h {minute:02}", "{hour}:{minute:02}"),
    amounts=("{number} {sign}", "{number} {code}", "{code} {number}"),
    comma=",",
    greetings=_words("Bonjour, Salut, Bonsoir, Chère équipe, Coucou, Madame Monsieur"),
    asides=_lines("""
        Merci beaucoup
        Il pleut sans arrêt ici
        Je suis client depuis 6 ans
        Pardon pour l'urgence
        Ma référence est 58213
        Faites vite
        C'était parfait la dernière fois
        À bientôt
        Nous en avons parlé
        Je suis dans le bus, ligne 14"""),
)

SPANISH = Language(
    code="es",
    phrases={
        "order": _lines("""
            Quisiera pedir {quantity} {item}
            Por favor, envíeme {quantity} {item}
            Necesitamos {quantity} x {item}
            {quantity} {item}, por favor
            ¿Me puede guardar {quantity} {item}?
            Nuevo pedido: {item}, {quantity} unidades
            Me llevo {quantity} de sus {item}
            Nos faltan {item}, así que {quantity} más
            {quantity} veces {item} para nosotros
            Voy a necesitar {quantity} {item}"""),
        "appointment": _lines("""
            Quisiera una cita: {item}
            ¿Podemos vernos para {item}?
            Para la agenda: {item}
            Se ha cambiado la cita {item}
            ¿Tiene un hueco para {item}?
            Recordatorio: {item}
            Hagamos {item}
            Tiene una cita, {item}
            Necesito pronto {item}
            Confirmamos: {item}"""),
        "contact": _lines("""
            {name} tiene otra dirección: {contact}
            Puede localizar a {name} en {contact}
            Guarde {contact} para {name}
            Mi nuevo contacto es {contact}, {name}
            Si hay preguntas, escribir a {name}, {contact}
            {name} tiene ahora {contact}
            Los datos de {name}: {contact}
            Cambie la ficha de {name} a {contact}
            {contact} es ahora de {name}
            Nuevo en la lista: {name}, {contact}"""),
        "expense": _lines("""
            He pagado {amount} por {item}
            Gasto: {item}, {amount}
            {amount} se fueron en {item}
            Devuélvame {amount}, era {item}
            {item} salió por {amount}
            La factura de {item} es de {amount}
            Gastados {amount} en {item}
            {item} ha costado {amount}
            Aquí está el recibo de {item}: {amount}
            Tuve que pagar {amount} por {item}"""),
        "name": _lines("""
            Me llamo {name}
            Soy {name}
            Es para {name}
            Pregunte por {name}
            Saludos, {name}
            {name} estará allí
            De parte de {name}
            Firmado, {name}
            A nombre de {name}
            Un saludo de {name}"""),
        "place": _lines("""
            Es en {place}
            Lugar: {place}
            Estamos en {place}
            Sería en {place}
            El sitio es {place}
            {place} como siempre
            La dirección es en {place}
            Fue en {place}
            En algún lugar de {place}
            Nos encuentra en {place}"""),
        "date": _lines("""
            La fecha es el {date}
            El {date}
            Tiene que ser el {date}
            Que sea el {date}
            El {date} es el día
            Es o fue el {date}
            Apunte el {date}
            Fecha: {date}
            El {date} nos va bien
            Solo es posible el {date}"""),
        "time": _lines("""
            A las {time}
            La hora es {time}
            Hacia las {time}
            {time} es lo mejor
            Empieza a las {time}
            No antes de las {time}
            Hora: {time}
            {time} estaría bien
            Digamos {time}
            {time} en punto"""),
        "amount": _lines("""
            Puede costar {amount}
            El total es {amount}
            Acordamos {amount}
            Precio: {amount}
            Pago hasta {amount}
            {amount} en total
            Usted ofreció {amount}
            El precio era {amount}
            Por {amount}, como acordamos
            Su oferta dice {amount}"""),
        "contact detail": _lines("""
            Estoy en {contact}
            Escriba a {contact}
            Mi contacto: {contact}
            Preguntas a {contact}
            Respuesta a {contact}
            {contact} para localizarnos
            Confirme a {contact}
            Use {contact}
            Tiene {contact} para preguntas
            El contacto es {contact}"""),
    },
    labels={
        "order": _words("Pedido, Compra, Para comprar, Encargo, Artículos pedidos"),
        "appointment": _words("Cita, Reunión, Agenda, Encuentro, Reserva"),
        "contact": _words("Contacto, Lista, Nuevo contacto, Persona, Ficha"),
        "expense": _words("Gasto, Recibo, Costes, Gastado, Factura"),
        "item": _words("Artículo, Qué, Asunto, Tema, Cosa"),
        "quantity": _words("Cantidad, Número, Piezas, Unidades, Cuántos"),
        "name": _words("Nombre, Persona, Quién, Para, De"),
        "place": _words("Lugar, Ciudad, Dónde, Dirección, Sitio"),
        "date": _words("Fecha, Día, Cuándo, El, El día"),
        "time": _words("Hora, A las, Horario, Inicio, Empieza"),
        "amount": _words("Importe, Precio, Coste, Total, Suma"),
        "contact detail": _words("Contacto, Localizar, Responder a, Datos, Correo o teléfono"),
    },
    items={
        "order": (
            _words(
                "estanterías, lámparas, sillas, cajas, mantas, cestas, botellas, marcos, cojines,"
                " ganchos, mesas, bandejas, bolsas, relojes, taburetes"
            ),
            _words(
                "de madera, de jardín, de oficina, de cristal, de viaje, de cocina, de acero, azules,"
                " de papel, de algodón, plegables, de cuero, para niños, de bambú, de metal"
            ),
        ),
        "appointment": (
            _words(
                "reunión, visita, clase, entrevista, balance, revisión, presentación, sesión, taller,"
                " examen"
            ),
            _words(
                "de presupuesto, de proyecto, de piano, anual, técnica, de ventas, de idiomas,"
                " de seguridad, legal, de equipo, del contrato, dental, de energía, de planificación,"
                " del estudio"
            ),
        ),
        "expense": (
            _words(
                "billetes, comida, gastos, factura, alquiler, abono, servicio, bono, depósito,"
                " reparación"
            ),
            _words(
                "de tren, de oficina, de hotel, de congreso, de impresora, de museo, de coche,"
                " de teléfono, de aparcamiento, de limpieza, de taxi, de avión, de programas, de barco,"
                " de garaje"
            ),
        ),
    },
    joint=" ",
    months=_words(
        "enero, febrero, marzo, abril, mayo, junio, julio, agosto, septiembre, octubre, noviembre,"
        " diciembre"
    ),
    numbers=_words("dos, tres, cuatro, cinco, seis, siete, ocho, nueve, diez, once, doce"),
    dates=(
        *("{day} de {month}", "{day} de {month} de 2026"),
        *("{day:02}/{number:02}/2026", "{day}/{number}"),
    ),
    times=("{hour}:{minute:02}", "{hour}:{minute:02} h", "{hour}.{minute:02}"),
    amounts=("{number} {sign}", "{number} {code}", "{code} {number}"),
    comma=",",
    greetings=_words("Hola, Buenos días, Buenas tardes, Estimado equipo, Buenas, Qué tal"),
    asides=_lines("""
        Muchas gracias
        Aquí no para de llover
        Soy cliente desde hace 6 años
        Perdone la prisa
        Mi referencia es 58213
        Dense prisa
        La última vez fue perfecto
        Hasta pronto
        Lo hablamos la semana pasada
        Voy en el autobús, línea 14"""),
)

LANGUAGES = (ENGLISH, GERMAN, FRENCH, SPANISH)

# --- values of all languages

FIRST_NAMES = _words(
    "Mira, Jonas, Aylin, Pedro, Chiara, Tom, Nadia, Lukas, Ines, Omar, Clara, Viktor, Sofia, Emil,"
    " Yara, Hugo, Leila, Marek, Anna, Diego, Freya, Paul, Noor, Felix, Irina, Samuel, Lea, Karim,"
    " Elena, Oscar, Maja, Ravi, Julie, Anton, Zoe, Mateo, Greta, Ivan, Amina, Theo, Rosa, Nils,"
    " Carmen, Jakob, Linh, Bruno, Edith, Tariq, Vera, Simon, Alba, Henrik, Fatima, Louis, Daria,"
    " Kenji, Marta, Adrian, Selma, Pavel, Olivia, Hassan, Ida, Marco, Priya, Stefan, Camille, Youssef,"
    " Tilda, Rafael, Nora, Dmitri, Agnes, Luca, Zainab, Gustav, Paula, Idris, Hanna, Andrei, Lucia,"
    " Boris, Meera, Florian, Esther, Pablo, Astrid, Nikhil, Monica, Erik, Salma, Victor, Judith, Kofi,"
    " Ella, Tobias, Renata, Malik, Flora, Matthias"
)
LAST_NAMES = _words(
    "Olsen, Brandt, Demir, Navarro, Rossi, Walker, Haddad, Keller, Moreau, Farah, Lindqvist, Novak,"
    " Martins, Berg, Saleh, Dubois, Karimi, Nowak, Schmidt, Torres, Hansen, Becker, Rahman, Weber,"
    " Petrova, Cohen, Laurent, Benali, Vargas, Nguyen, Kowalski, Sharma, Bernard, Wolf, Papadakis,"
    " Ortega, Fischer, Horvat, Diallo, Meyer, Castillo, Larsen, Iglesias, Vogel, Tran, Ferrari, Young,"
    " Aziz, Sorensen, Klein, Marchetti, Hoffmann, Okafor, Lemaire, Sandberg, Popescu, Gupta, Romero,"
    " Barnes, Yilmaz, Kaiser, Fontaine, Eriksson, Mendes, Toth, Winkler, Ivanova, Delgado, Hughes,"
    " Mansour, Richter, Girard, Nilsson, Costa, Varga, Krause, Sokolova, Herrera, Palmer, Osman, Frank,"
    " Perrin, Holm, Silva, Molnar, Albrecht, Volkov, Fuentes, Bishop, Chaudhry, Seidel, Renard, Dahl,"
    " Pereira, Szabo, Engel, Orlova, Cabrera, Mercer, Rashid"
)
# First and second parts of composed names: their number keeps a model from learning a list.
NAME_PARTS = (
    _words(
        "Al, Be, Ca, Dan, El, Fa, Gi, Har, Is, Jo, Ka, Lu, Ma, Ni, Or, Pa, Ro, Sa, Te, Vi, Wa, Ze,"
        " Bri, Cor, Tam"
    ),
    _words("lan, bert, dra, lia, nik, rin, sha, tan, vor, mir, ela, ona, ias, ette, ulf"),
)
PLACES = _words(
    "Oslo, Leipzig, Lyon, Valencia, Bristol, Graz, Porto, Aarhus, Basel, Nantes, Girona, Leeds,"
    " Bremen, Turin, Ghent, Malmö, Toulouse, Bilbao, Cardiff, Krakow, Zurich, Lille, Murcia, Dublin,"
    " Kassel, Bergen, Rennes, Toledo, Perth, Linz, Brno, Metz, Vigo, Exeter, Ulm, Turku, Parma, Dijon,"
    " Aachen, York, Cork, Varna, Split, Reims, Bonn, Siena, Odense, Delft, Cadiz, Gdansk, Trier, Bath,"
    " Nancy, Lugano, Faro, Jena, Tartu, Gijon, Luzern, Sligo"
)
PLACE_PARTS = (
    _words(
        "Oak, Ash, Lin, Wald, Stein, Mar, Nor, Berg, Cam, Hart, Kal, Rosen, Sal, Tor, Wes, Brad, Frei,"
        " Grün, Ost, Ven"
    ),
    _words(
        "ford, hausen, ville, ton, burg, mont, dorf, stad, field, beck, heim, nova, bach, port, lund"
    ),
)
MAIL_DOMAINS = _words("example.com, example.org, posta.example, mail.example, team.example")
CURRENCIES = {"EUR": "€", "USD": "$", "GBP": "£"}
