"""What the sentences of `data.synthetic` are made of: words, and templates by section of a résumé."""


def _split(choices: str) -> tuple[str, ...]:
    """Alternatives written as running text: "a | b" -> ("a", "b")."""
    return tuple(" ".join(choice.split()) for choice in choices.split("|"))


# An applicant has one field: its job titles and its skills.
FIELDS = (
    (_split("Data Analyst | Data Scientist | Machine Learning Engineer | Statistician | BI Developer"),
     _split("""Python | SQL | R | pandas | NumPy | scikit-learn | PyTorch | Spark | Airflow | dbt | Tableau
        | Excel | statistics | A/B testing | forecasting | feature engineering | Snowflake | time series""")),
    (_split("Web Developer | Frontend Engineer | Full-Stack Developer | Software Engineer | App Developer"),
     _split("""JavaScript | TypeScript | React | Vue | Node.js | HTML | CSS | GraphQL | REST APIs | Django
        | Redis | PostgreSQL | accessibility | Figma | Kotlin | Swift | Java | Git | unit testing""")),
    (_split("DevOps Engineer | Site Reliability Engineer | Cloud Architect | System Administrator"),
     _split("""Linux | Docker | Kubernetes | Terraform | Ansible | AWS | Azure | Bash | Go | Prometheus
        | Kafka | Jenkins | networking | incident response | monitoring | load balancing | threat models""")),
    (_split("Mechanical Engineer | Embedded Developer | Quality Engineer | Electronics Technician"),
     _split("""C | C++ | MATLAB | Simulink | SolidWorks | AutoCAD | PLC programming | CAN bus | soldering
        | FPGA | PCB design | lean production | six sigma | 3D printing | root cause analysis | ISO 9001""")),
    (_split("Marketing Manager | Product Manager | Account Executive | Project Coordinator | Recruiter"),
     _split("""Salesforce | SEO | Google Analytics | copywriting | budgeting | negotiation | market research
        | SAP | Jira | roadmapping | HubSpot | email campaigns | bookkeeping | PowerPoint | user interviews
        | pricing | contract review | event planning | public speaking""")),
)  # fmt: skip

# Words for any applicant. A name in braces is replaced by one of these words, by one of the person's own
# (`_Writer.new_person`), or by what `_Writer.fill` makes.
WORDS = {
    "n": tuple("23456789"),
    "year": tuple(str(year) for year in range(1998, 2026)),
    "done": _split("""built | designed | developed | rewrote | maintained | automated | launched | tested
        | set up | documented | introduced | migrated | prototyped | improved | planned | owned | shipped"""),
    "artefact": _split("""a reporting dashboard | an inventory system | a booking app
        | a recommendation engine | a data pipeline | a chat bot | a monitoring service | an internal wiki
        | a fraud detector | a test bench | a pricing model | a search index | a customer portal
        | a billing service | a sensor network | a robot arm | an image classifier | a scheduling tool
        | a payment gateway | a route planner | a training course | a weekly newsletter | an API for {topic}
        | a tool to {bs}"""),
    "result": _split("""saved ${n}0k a year | cut costs by {n} % | reduced errors by {n} %
        | halved waiting times | used by {n}00 people | grew revenue by {n} % | raised coverage to 9{n} %
        | now in production | finished {n} weeks early | answered {n}k requests a day | won second prize
        | presented to the board"""),
    "topic": _split("""machine learning | supply chains | renewable energy | customer analytics
        | process control | distributed systems | digital marketing | user research | computer vision
        | financial planning | web accessibility | information security | health care | public transport
        | logistics | e-commerce"""),
    "soft": _split("""teamwork | clear writing | problem solving | mentoring | attention to detail
        | leadership | time management | communication | flexibility | analytical mind | customer focus"""),
    "department": _split("sales | engineering | operations | marketing | finance | support | legal"),
    "adjective": _split("""motivated | experienced | results-driven | curious | reliable | certified
        | versatile | hands-on | detail-oriented | bilingual | ambitious | self-taught | pragmatic"""),
    "degree": _split("B.Sc. | M.Sc. | Bachelor of Arts | Master of Science | MBA | Ph.D. | B.Eng. | Diploma"),
    "subject": _split("""Computer Science | Economics | Physics | Statistics | Mechanical Engineering
        | Biology | Business Administration | Electrical Engineering | Psychology | Mathematics"""),
    "course": _split("""linear algebra | databases | operating systems | macroeconomics | thermodynamics
        | signal processing | algorithms | accounting | experimental design | control theory"""),
    "certificate": _split("""Certified Scrum Master | Project Management Professional
        | AWS Solutions Architect | ITIL Foundation | Six Sigma Green Belt | CompTIA Security+"""),
    "language": _split("Spanish | German | French | Mandarin | Hindi | Portuguese | Arabic | Polish"),
    "level": _split("basic | intermediate | advanced | expert | fluent | working knowledge"),
    "month": _split("Jan | February | Mar | April | May | June | July | Aug | Sept | October | Nov | Dec"),
    "team": _split("a team of {n} | two colleagues | {department} and {department} | volunteers | students"),
}  # fmt: skip

# Sentences of one section.
OWN = {
    "Contact Information": _split("""{name} | {street}, {city} | Phone: {phone} | E-mail: {email}
        | {name}, {title} | {email} / {phone} | Tel. {phone} (evenings) | Mobile {phone}, {email}
        | Reach me at {email} or {link} | Reference: {name}, {company}, {phone}"""),
    "Education": _split("""{degree} in {subject}, {university}, {span}
        | {university} - {degree} {subject} ({year}) | {degree}, {subject} | GPA 3.{n}
        | Graduated with honours, {year} | Minor in {subject}
        | Thesis on {topic} using {skill}, supervised in {city} | Exchange semester at {university}
        | Courses included {course}, {course} and {course} | Graduate classes in {course}, grade A
        | Dean's list in {year}; scholarship from {company} | {city} High School, {year}"""),
    "Work Experience": _split("""{title}, {company}, {city} ({span}) | {span}: {title} at {company}
        | {company} - {title}, {months} | Reported to the head of {department}
        | Responsible for {topic} in the {department} department of {company}
        | Supervised {n} employees and interns; promoted to {title} in {year}
        | Internship in {department} at {company}, {month} {year} | Worked with {department} to {bs}
        | Managed client accounts in {city}, {result} | Trained new staff on {skill} and {skill}
        | Handled daily operations and on-call duty for {artefact}"""),
    "Skills": _split("""{skills} | {skills}, {soft} | Proficient in {skills} | Tools: {skills}
        | {skill} ({level}), {skill} ({level}), {skill} ({n} years) | Familiar with {skill} and {skill}
        | {language} ({level}), English (native) | Soft skills: {soft}, {soft}, {soft} | {level}: {skills}
        | Methods: {topic}, {skill}, {skill}"""),
    "Projects": _split("""{phrase}: {artefact} in {skill} | Side project: {artefact} to {bs} | Code at {link}
        | Personal project on {topic} with {skills} | Hackathon in {city}, {year}: {artefact} in {n} days
        | Open-source contributor to {artefact}, {n}0 stars | {artefact} ({year}) - {skills}
        | Wrote {artefact} for fun to learn {skill} | Volunteer work: {artefact} for a charity in {city}"""),
    "Summary": _split("""{adjective} {title} with {n} years of experience in {topic}
        | Known for {soft} and {soft} | Looking for a role in {topic} where I can {bs}
        | Passionate about {topic} and {topic} | My goal is to {bs} as a {title}
        | {adjective} professional with a {degree} in {subject} and {soft}
        | Seeking a position as {title} in {city} | Brings {soft}, {soft} and {n} years in {department}"""),
}  # fmt: skip

# Sentences that occur in each of the named sections, so that a bag of words cannot tell the sections apart.
SHARED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("Work Experience", "Projects"): _split("""{done} {artefact} with {skill} and {skill}
        | {done} {artefact}, {result} | {done} {artefact} for {company}, {result}
        | {done} and {done} {artefact} together with {team} | {result} by moving {artefact} to {skill}
        | {phrase}, {month} {year}"""),
    ("Work Experience", "Projects", "Skills"): _split("Technologies: {skills} | Stack: {skills}"),
    ("Work Experience", "Summary"): _split("{n} years at {company} in {topic}, {skill} | Led {team} to {bs}"),
    ("Work Experience", "Summary", "Skills"): _split("Hands-on experience with {skills}"),
    ("Skills", "Summary"): _split("""Strong in {topic}, {skill} and {soft}
        | {soft}, {soft}, {language} ({level})"""),
    ("Education", "Projects"): _split("Final-year project at {university}: {artefact} with {skill}"),
    ("Education", "Projects", "Work Experience"): _split("Research on {topic} with {university}, {year}"),
    ("Education", "Work Experience"): _split("""Teaching assistant for {course}, {university}, {span}
        | {university}, {city}, {span}"""),
    ("Education", "Skills"): _split("{certificate}, {year} | {n}-week course in {skill} and {topic}"),
    ("Education", "Summary"): _split("{degree} {subject} graduate of {university} with a focus on {topic}"),
    ("Contact Information", "Projects"): _split("{link}"),
    ("Contact Information", "Summary"): _split("""{title} based in {city}, open to relocation
        | Available from {month} {year}, work permit at hand"""),
}  # fmt: skip

HEADINGS = {
    "Contact Information": _split("Contact | Personal details | Contact information"),
    "Education": _split("Education | Academic background | Qualifications | Education and training"),
    "Work Experience": _split("Experience | Work experience | Employment history | Selected work"),
    "Skills": _split("Skills | Technical skills | Qualifications | Competences"),
    "Projects": _split("Projects | Selected work | Portfolio | Projects and experience"),
    "Summary": _split("Summary | Profile | About me | Personal details"),
}
PAGE_HEADERS = ("{name} - page {n}", "{name}, {email}", "Curriculum vitae {name}")
