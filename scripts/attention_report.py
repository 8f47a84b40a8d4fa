from guided_diffusion.commands.attention_report import main

if __name__ == "__main__":
    main()
